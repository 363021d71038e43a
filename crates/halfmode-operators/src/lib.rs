//! Neural operators: the Fourier neural operator in one, two and three dimensions
#![forbid(unsafe_code)]
