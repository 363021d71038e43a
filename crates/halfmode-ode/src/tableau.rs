//! Explicit Runge-Kutta methods as Butcher tableaux.

/// An explicit Runge-Kutta method: `k_j = f(t + c_j h, y + h sum_m a_jm k_m)`, `y + h sum_j b_j k_j`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tableau {
    /// The name in reports.
    pub name: &'static str,
    /// Order of `b`.
    pub order: u32,
    /// Rows of the lower triangle, the first empty.
    pub a: &'static [&'static [f64]],
    /// Weights.
    pub b: &'static [f64],
    /// Nodes.
    pub c: &'static [f64],
}

impl Tableau {
    /// Stages.
    #[must_use]
    pub const fn n_stages(&self) -> usize {
        self.b.len()
    }
}

/// The explicit methods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Method {
    /// Order 1.
    Euler,
    /// Order 2.
    Midpoint,
    /// Order 2, the trapezoidal rule with an Euler step.
    Heun,
    /// The classical method of order 4: weights 1, 2, 2, 1 over 6. It is rampde's `rk4`.
    #[default]
    Rk4,
    /// The 3/8 rule, order 4: weights 1, 3, 3, 1 over 8. It is torchdiffeq's `rk4`.
    Rk4ThreeEighths,
}

const EULER: Tableau = Tableau { name: "euler", order: 1, a: &[&[]], b: &[1.0], c: &[0.0] };

const MIDPOINT: Tableau = Tableau { name: "midpoint", order: 2, a: &[&[], &[0.5]], b: &[0.0, 1.0], c: &[0.0, 0.5] };

const HEUN: Tableau = Tableau { name: "heun", order: 2, a: &[&[], &[1.0]], b: &[0.5, 0.5], c: &[0.0, 1.0] };

const RK4: Tableau = Tableau {
    name: "rk4",
    order: 4,
    a: &[&[], &[0.5], &[0.0, 0.5], &[0.0, 0.0, 1.0]],
    b: &[1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0],
    c: &[0.0, 0.5, 0.5, 1.0],
};

const RK4_THREE_EIGHTHS: Tableau = Tableau {
    name: "rk4_38",
    order: 4,
    a: &[&[], &[1.0 / 3.0], &[-1.0 / 3.0, 1.0], &[1.0, -1.0, 1.0]],
    b: &[0.125, 0.375, 0.375, 0.125],
    c: &[0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0],
};

impl Method {
    /// All methods.
    pub const ALL: [Method; 5] = [Method::Euler, Method::Midpoint, Method::Heun, Method::Rk4, Method::Rk4ThreeEighths];

    /// Its coefficients.
    #[must_use]
    pub const fn tableau(self) -> &'static Tableau {
        match self {
            Method::Euler => &EULER,
            Method::Midpoint => &MIDPOINT,
            Method::Heun => &HEUN,
            Method::Rk4 => &RK4,
            Method::Rk4ThreeEighths => &RK4_THREE_EIGHTHS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `a x`, component by component.
    fn through(tableau: &Tableau, x: &[f64]) -> Vec<f64> {
        tableau.a.iter().map(|row| row.iter().zip(x).map(|(a, x)| a * x).sum()).collect()
    }

    fn times(x: &[f64], y: &[f64]) -> Vec<f64> {
        x.iter().zip(y).map(|(x, y)| x * y).collect()
    }

    /// The rooted trees of at most five vertices as (order, elementary weight vector, density).
    fn trees(tableau: &Tableau) -> Vec<(u32, Vec<f64>, f64)> {
        let one = vec![1.0; tableau.n_stages()];
        let c = tableau.c.to_vec();
        let (c2, ac) = (times(&c, &c), through(tableau, &c));
        let (c3, ac2, cac, aac) = (times(&c, &c2), through(tableau, &c2), times(&c, &ac), through(tableau, &ac));
        vec![
            (1, one, 1.0),
            (2, c.clone(), 2.0),
            (3, c2.clone(), 3.0),
            (3, ac.clone(), 6.0),
            (4, c3.clone(), 4.0),
            (4, cac.clone(), 8.0),
            (4, ac2.clone(), 12.0),
            (4, aac.clone(), 24.0),
            (5, times(&c, &c3), 5.0),
            (5, times(&c2, &ac), 10.0),
            (5, times(&c, &ac2), 15.0),
            (5, times(&c, &aac), 30.0),
            (5, times(&ac, &ac), 20.0),
            (5, through(tableau, &c3), 20.0),
            (5, through(tableau, &cac), 40.0),
            (5, through(tableau, &ac2), 60.0),
            (5, through(tableau, &aac), 120.0),
        ]
    }

    /// The order of weights: all trees up to it are met, and one beyond is not.
    fn order_of(tableau: &Tableau, b: &[f64]) -> u32 {
        let met = |(_, weights, density): &(u32, Vec<f64>, f64)| {
            // Rounding of coefficients up to 13 in size, of 16 digits, in sums of at most 49 terms.
            (times(b, weights).iter().sum::<f64>() - 1.0 / density).abs() < 1e-13
        };
        let trees = trees(tableau);
        (1..=5).take_while(|order| trees.iter().filter(|it| it.0 == *order).all(met)).last().unwrap_or(0)
    }

    #[test]
    fn every_method_meets_the_order_conditions_of_its_order_and_no_more() {
        for method in Method::ALL {
            let tableau = method.tableau();
            assert_eq!(order_of(tableau, tableau.b), tableau.order, "{method:?}");
        }
    }

    #[test]
    fn rows_sum_to_nodes() {
        for tableau in Method::ALL.map(Method::tableau) {
            assert_eq!((tableau.a.len(), tableau.c.len()), (tableau.n_stages(), tableau.n_stages()));
            for (j, (row, c)) in tableau.a.iter().zip(tableau.c).enumerate() {
                assert_eq!(row.len(), j, "{}: row {j}", tableau.name);
                assert!((row.iter().sum::<f64>() - c).abs() < 1e-14, "{}: row {j}", tableau.name);
            }
        }
    }
}
