//! Plans, made once per equation, shapes, type and policy.

use crate::{Equation, Plan, Policy, Result};
use halfmode_precision::DType;
use halfmode_tensor::Shape;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    equation: Equation,
    shapes: Vec<Shape>,
    dtype: DType,
    policy: Policy,
}

/// What a [`Planner`] was asked and how often it knew the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Plans that were found.
    pub hits: u64,
    /// Plans that were made, or could not be.
    pub misses: u64,
    /// Plans held.
    pub n_plans: usize,
}

#[derive(Debug, Default)]
struct Plans {
    by_key: HashMap<Key, Arc<Plan>>,
    stats: CacheStats,
}

/// Makes plans and keeps them. Shared between threads by reference; a plan is made once even if
/// several ask for it at the same time.
#[derive(Debug, Default)]
pub struct Planner {
    plans: Mutex<Plans>,
}

impl Planner {
    /// A planner that holds nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The plan for operands of these shapes and this type.
    ///
    /// # Errors
    /// Those of [`Plan::new`]; failures are not kept.
    pub fn plan(&self, equation: &Equation, shapes: &[Shape], dtype: DType, policy: Policy) -> Result<Arc<Plan>> {
        let key = Key { equation: equation.clone(), shapes: shapes.to_vec(), dtype, policy };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.by_key.get(&key).map(Arc::clone) {
            plans.stats.hits += 1;
            return Ok(plan);
        }
        plans.stats.misses += 1;
        let plan = Arc::new(Plan::new(equation, shapes, policy)?);
        plans.by_key.insert(key, Arc::clone(&plan));
        plans.stats.n_plans = plans.by_key.len();
        Ok(plan)
    }

    /// Hits, misses and plans held.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).stats
    }

    /// Forgets all plans and counts.
    pub fn clear(&self) {
        *self.plans.lock().unwrap_or_else(PoisonError::into_inner) = Plans::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfmode_precision::Precision;

    #[test]
    fn every_part_of_the_key_counts_and_threads_share() {
        let planner = Planner::new();
        let equation = Equation::parse("ab,bc->ac").unwrap();
        let shapes = |n: usize| vec![Shape::from([2, n]), Shape::from([n, 4])];
        let f16 = DType::real(Precision::F16);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| planner.plan(&equation, &shapes(3), f16, Policy::Memory).unwrap());
            }
        });
        assert_eq!(planner.stats(), CacheStats { hits: 3, misses: 1, n_plans: 1 });
        let again = planner.plan(&equation, &shapes(3), f16, Policy::Memory).unwrap();
        assert!(Arc::ptr_eq(&again, &planner.plan(&equation, &shapes(3), f16, Policy::Memory).unwrap()));
        planner.plan(&equation, &shapes(5), f16, Policy::Memory).unwrap();
        planner.plan(&equation, &shapes(3), DType::complex(Precision::F16), Policy::Memory).unwrap();
        planner.plan(&equation, &shapes(3), f16, Policy::Flops).unwrap();
        planner.plan(&equation, &shapes(3), f16, Policy::balanced()).unwrap();
        assert_eq!(planner.stats(), CacheStats { hits: 5, misses: 5, n_plans: 5 });
        assert!(planner.plan(&equation, &[], f16, Policy::Memory).is_err());
        assert_eq!((planner.stats().misses, planner.stats().n_plans), (6, 5));
        planner.clear();
        assert_eq!(planner.stats(), CacheStats::default());
    }
}
