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
    /// A second set of weights, whose difference to the first estimates the error of a step.
    pub embedded: Option<Embedded>,
}

/// Weights of another order for the same stages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Embedded {
    /// Order of `b`.
    pub order: u32,
    /// Weights.
    pub b: &'static [f64],
}

impl Tableau {
    /// Stages.
    #[must_use]
    pub const fn n_stages(&self) -> usize {
        self.b.len()
    }

    /// Stages that the step itself needs: the last ones may serve the error estimate alone.
    #[must_use]
    pub fn n_weighted(&self) -> usize {
        self.b.iter().rposition(|b| *b != 0.0).map_or(0, |idx| idx + 1)
    }

    /// Whether the last stage of a step is the first of the next.
    #[must_use]
    pub fn is_fsal(&self) -> bool {
        self.a.last().is_some_and(|row| !row.is_empty() && **row == self.b[..row.len()] && self.b[row.len()] == 0.0)
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
    /// Bogacki and Shampine's pair of orders 3 and 2.
    BogackiShampine32,
    /// Dormand and Prince's pair of orders 5 and 4: `dopri5`.
    DormandPrince54,
    /// Tsitouras' pair of orders 5 and 4.
    Tsitouras54,
    /// The asynchronous leapfrog, order 2, one velocity in a step: `y_h = y + h/2 v`, `v' = 2 f(t + h/2, y_h) - v`,
    /// `y' = y_h + h/2 v'`, from `v = f(t_0, y_0)`. Its steps can be taken back, so it goes with
    /// [`Storage::Reversible`](crate::Storage::Reversible) and only with it. Like other leapfrogs it does not damp: beside the solution
    /// of `y' = -k y` a part grows like `e^(k t)`, so it is for times of a few `1/k` at most.
    AsynchronousLeapfrog,
}

pub(crate) const EULER: Tableau = Tableau { name: "euler", order: 1, a: &[&[]], b: &[1.0], c: &[0.0], embedded: None };

const MIDPOINT: Tableau =
    Tableau { name: "midpoint", order: 2, a: &[&[], &[0.5]], b: &[0.0, 1.0], c: &[0.0, 0.5], embedded: None };

/// Of the first step, which is the midpoint rule's: `v` is the slope at its beginning.
const LEAPFROG: Tableau = Tableau { name: "asynchronous leapfrog", ..MIDPOINT };

const HEUN: Tableau =
    Tableau { name: "heun", order: 2, a: &[&[], &[1.0]], b: &[0.5, 0.5], c: &[0.0, 1.0], embedded: None };

const RK4: Tableau = Tableau {
    name: "rk4",
    order: 4,
    a: &[&[], &[0.5], &[0.0, 0.5], &[0.0, 0.0, 1.0]],
    b: &[1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0],
    c: &[0.0, 0.5, 0.5, 1.0],
    embedded: None,
};

const RK4_THREE_EIGHTHS: Tableau = Tableau {
    name: "rk4_38",
    order: 4,
    a: &[&[], &[1.0 / 3.0], &[-1.0 / 3.0, 1.0], &[1.0, -1.0, 1.0]],
    b: &[0.125, 0.375, 0.375, 0.125],
    c: &[0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0],
    embedded: None,
};

const BOGACKI_SHAMPINE: Tableau = Tableau {
    name: "bosh3",
    order: 3,
    a: &[&[], &[0.5], &[0.0, 0.75], &[2.0 / 9.0, 1.0 / 3.0, 4.0 / 9.0]],
    b: &[2.0 / 9.0, 1.0 / 3.0, 4.0 / 9.0, 0.0],
    c: &[0.0, 0.5, 0.75, 1.0],
    embedded: Some(Embedded { order: 2, b: &[7.0 / 24.0, 0.25, 1.0 / 3.0, 0.125] }),
};

const DORMAND_PRINCE: Tableau = Tableau {
    name: "dopri5",
    order: 5,
    a: &[
        &[],
        &[0.2],
        &[3.0 / 40.0, 9.0 / 40.0],
        &[44.0 / 45.0, -56.0 / 15.0, 32.0 / 9.0],
        &[19372.0 / 6561.0, -25360.0 / 2187.0, 64448.0 / 6561.0, -212.0 / 729.0],
        &[9017.0 / 3168.0, -355.0 / 33.0, 46732.0 / 5247.0, 49.0 / 176.0, -5103.0 / 18656.0],
        &[35.0 / 384.0, 0.0, 500.0 / 1113.0, 125.0 / 192.0, -2187.0 / 6784.0, 11.0 / 84.0],
    ],
    b: &[35.0 / 384.0, 0.0, 500.0 / 1113.0, 125.0 / 192.0, -2187.0 / 6784.0, 11.0 / 84.0, 0.0],
    c: &[0.0, 0.2, 0.3, 0.8, 8.0 / 9.0, 1.0, 1.0],
    embedded: Some(Embedded {
        order: 4,
        b: &[5179.0 / 57600.0, 0.0, 7571.0 / 16695.0, 393.0 / 640.0, -92097.0 / 339200.0, 187.0 / 2100.0, 1.0 / 40.0],
    }),
};

/// Tsitouras 2011, in double precision; the order conditions in the tests bind every digit that matters.
const TSITOURAS: Tableau = Tableau {
    name: "tsit5",
    order: 5,
    a: &[
        &[],
        &[0.161],
        &[-0.008480655492356989, 0.335480655492357],
        &[2.8971530571054935, -6.359448489975075, 4.3622954328695815],
        &[5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525],
        &[5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383],
        &[0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774],
    ],
    b: &[0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0],
    c: &[0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0],
    // The weights less the published differences.
    embedded: Some(Embedded {
        order: 4,
        b: &[
            0.09646076681806523 - 0.001780011052225777,
            0.01 - 0.0008164344596567469,
            0.4798896504144996 + 0.007880878010261995,
            1.379008574103742 - 0.1447110071732629,
            -3.290069515436081 + 0.5823571654525552,
            2.324710524099774 - 0.45808210592918697,
            1.0 / 66.0,
        ],
    }),
};

impl Method {
    /// The Runge-Kutta methods without an error estimate.
    pub const ALL: [Method; 5] = [Method::Euler, Method::Midpoint, Method::Heun, Method::Rk4, Method::Rk4ThreeEighths];

    /// Its coefficients; of the asynchronous leapfrog, which is no Runge-Kutta method, those of the first step.
    #[must_use]
    pub const fn tableau(self) -> &'static Tableau {
        match self {
            Method::Euler => &EULER,
            Method::Midpoint => &MIDPOINT,
            Method::Heun => &HEUN,
            Method::Rk4 => &RK4,
            Method::Rk4ThreeEighths => &RK4_THREE_EIGHTHS,
            Method::BogackiShampine32 => &BOGACKI_SHAMPINE,
            Method::DormandPrince54 => &DORMAND_PRINCE,
            Method::Tsitouras54 => &TSITOURAS,
            Method::AsynchronousLeapfrog => &LEAPFROG,
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

    fn methods() -> impl Iterator<Item = Method> {
        Method::ALL.into_iter().chain([Method::BogackiShampine32, Method::DormandPrince54, Method::Tsitouras54])
    }

    #[test]
    fn every_method_meets_the_order_conditions_of_its_order_and_no_more() {
        for method in methods() {
            let tableau = method.tableau();
            assert_eq!(order_of(tableau, tableau.b), tableau.order, "{method:?}");
            if let Some(embedded) = tableau.embedded {
                assert_eq!(order_of(tableau, embedded.b), embedded.order, "{method:?}, embedded");
                assert!(tableau.is_fsal() && tableau.n_weighted() + 1 == tableau.n_stages(), "{method:?}");
            } else {
                assert!(!tableau.is_fsal() && tableau.n_weighted() == tableau.n_stages(), "{method:?}");
            }
        }
    }

    #[test]
    fn rows_sum_to_nodes() {
        for tableau in methods().map(Method::tableau) {
            assert_eq!((tableau.a.len(), tableau.c.len()), (tableau.n_stages(), tableau.n_stages()));
            for (j, (row, c)) in tableau.a.iter().zip(tableau.c).enumerate() {
                assert_eq!(row.len(), j, "{}: row {j}", tableau.name);
                assert!((row.iter().sum::<f64>() - c).abs() < 1e-14, "{}: row {j}", tableau.name);
            }
        }
    }
}
