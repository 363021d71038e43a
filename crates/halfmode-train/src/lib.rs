//! Training in mixed precision: losses, optimisers, loss scaling, checkpoints, reports
#![forbid(unsafe_code)]
