//! Parameters: storage at a stable place, in the layout that kernels want.

use crate::{Error, Result};
use halfmode_autograd::{LeafId, Tape, Var};
use halfmode_precision::{DType, OpPrecision, PrecisionPolicy};
#[cfg(feature = "cuda")]
use halfmode_tensor::cuda::Source;
use halfmode_tensor::{Device, Elementwise, Purpose, Real, Shape, Tensor};

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform in ±bound.
    Uniform {
        /// Half the width.
        bound: f64,
    },
    /// Normal with this standard deviation; for complex parameters the real and imaginary parts
    /// each have `std / sqrt(2)`.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// All ones.
    Ones,
    /// All zeros.
    Zeros,
}

/// Which ops read a parameter; decides its storage precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamRole {
    /// Dense layers and biases.
    Pointwise,
    /// Weights of a mode contraction.
    Contraction,
    /// A statistic of the data that no gradient moves, in the precision of sums.
    Statistic,
}

/// How the file's array relates to the stored one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamLayout {
    /// The same, in the same order.
    Plain,
    /// File `[c_in, c_out, k_1, …, k_d]` complex; stored `[modes, c_in, 2 c_out]`, real parts of a row
    /// before its imaginary parts.
    SpectralDense,
    /// File `[c, k_1, …, k_d]` complex; stored `[modes, 2 c]`, real parts of a row before its imaginary parts.
    SpectralSeparable,
    /// File `[c_out, c_in, k_1, k_2]`; stored `[k_1, k_2, c_in, c_out]`, so that a convolution is matrix products.
    Convolution,
}

/// Everything about a parameter but its values.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// The peer's `state_dict` name.
    pub name: String,
    /// The peer's shape; a complex element counts once.
    pub file_shape: Vec<usize>,
    /// Whether elements are complex.
    pub complex: bool,
    /// How the file's array relates to the stored one.
    pub layout: ParamLayout,
    /// Which ops read it.
    pub role: ParamRole,
    /// How it starts.
    pub init: Init,
}

impl ParamSpec {
    /// A real parameter stored as in the file.
    #[must_use]
    pub fn real(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        let (name, file_shape) = (name.into(), shape.to_vec());
        ParamSpec { name, file_shape, complex: false, layout: ParamLayout::Plain, role: ParamRole::Pointwise, init }
    }

    /// A running statistic: it moves with what batches show, see [`Params::observe`].
    #[must_use]
    pub fn statistic(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        ParamSpec { role: ParamRole::Statistic, ..ParamSpec::real(name, shape, init) }
    }

    /// The weight of a two-dimensional convolution, file shape `[c_out, c_in, k_1, k_2]`.
    #[must_use]
    pub fn convolution(name: impl Into<String>, shape: [usize; 4], init: Init) -> Self {
        ParamSpec { layout: ParamLayout::Convolution, ..ParamSpec::real(name, &shape, init) }
    }

    /// A dense spectral weight, file shape `[c_in, c_out, k_1, …, k_d]`.
    #[must_use]
    pub fn spectral(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        let (name, file_shape) = (name.into(), shape.to_vec());
        let (layout, role) = (ParamLayout::SpectralDense, ParamRole::Contraction);
        ParamSpec { name, file_shape, complex: true, layout, role, init }
    }

    /// A separable spectral weight, file shape `[c, k_1, …, k_d]`.
    #[must_use]
    pub fn separable(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        ParamSpec { layout: ParamLayout::SpectralSeparable, ..ParamSpec::spectral(name, shape, init) }
    }

    /// (c_in, c_out, modes) of a spectral weight; a separable one is a row of matrices.
    fn spectral_dims(&self) -> Option<(usize, usize, usize)> {
        let shape = &self.file_shape;
        match self.layout {
            ParamLayout::Plain | ParamLayout::Convolution => None,
            ParamLayout::SpectralDense => Some((shape[0], shape[1], shape[2..].iter().product())),
            ParamLayout::SpectralSeparable => Some((1, shape[0], shape[1..].iter().product())),
        }
    }

    /// Real scalars.
    #[must_use]
    pub fn n_scalars(&self) -> usize {
        self.file_shape.iter().product::<usize>() * if self.complex { 2 } else { 1 }
    }

    /// The shape of the stored tensor.
    #[must_use]
    pub fn stored_shape(&self) -> Shape {
        match (self.layout, self.spectral_dims()) {
            (ParamLayout::SpectralDense, Some((c_in, c_out, modes))) => Shape::from([modes, c_in, 2 * c_out]),
            (ParamLayout::SpectralSeparable, Some((_, c, modes))) => Shape::from([modes, 2 * c]),
            (ParamLayout::Convolution, _) => {
                let axes = [2, 3, 1, 0].map(|axis| self.file_shape.get(axis).copied().unwrap_or(1));
                Shape::from(axes)
            }
            _ => Shape::new(&self.file_shape),
        }
    }

    /// Distance between the real and the imaginary part of one element in a stored row of twice
    /// that length; `None` for real parameters.
    #[must_use]
    pub fn complex_stride(&self) -> Option<usize> {
        self.spectral_dims().map(|(_, c_out, _)| c_out)
    }

    /// Stored order from file order (complex elements as interleaved pairs).
    #[must_use]
    pub fn to_stored<T: Copy + Default>(&self, file: &[T]) -> Vec<T> {
        self.permuted(file, |stored, file| (stored, file))
    }

    /// File order from stored order.
    #[must_use]
    pub fn to_file<T: Copy + Default>(&self, stored: &[T]) -> Vec<T> {
        self.permuted(stored, |stored, file| (file, stored))
    }

    fn permuted<T: Copy + Default>(&self, source: &[T], pick: impl Fn(usize, usize) -> (usize, usize)) -> Vec<T> {
        if self.layout == ParamLayout::Plain {
            return source.to_vec();
        }
        let mut out = vec![T::default(); source.len()];
        let mut place = |stored: usize, file: usize| {
            let (to, from) = pick(stored, file);
            out[to] = source[from];
        };
        if let (ParamLayout::Convolution, &[c_out, c_in, k1, k2]) = (self.layout, &self.file_shape[..]) {
            for (o, c) in (0..c_out).flat_map(|o| (0..c_in).map(move |c| (o, c))) {
                (0..k1 * k2).for_each(|k| place((k * c_in + c) * c_out + o, (o * c_in + c) * k1 * k2 + k));
            }
        }
        if let Some((c_in, c_out, modes)) = self.spectral_dims() {
            for (i, o) in (0..c_in).flat_map(|i| (0..c_out).map(move |o| (i, o))) {
                for (m, part) in (0..modes).flat_map(|m| (0..2).map(move |part| (m, part))) {
                    let stored = (m * c_in + i) * 2 * c_out + part * c_out + o;
                    place(stored, 2 * ((i * c_out + o) * modes + m) + part);
                }
            }
        }
        out
    }

    fn precision(&self, policy: &PrecisionPolicy) -> OpPrecision {
        match self.role {
            ParamRole::Pointwise | ParamRole::Statistic => policy.pointwise,
            ParamRole::Contraction => policy.contraction,
        }
    }
}

/// One parameter: what forward and backward read, and its high-precision master if the two differ.
#[derive(Debug)]
pub struct Parameter {
    /// Everything but the values.
    pub spec: ParamSpec,
    /// What forward and backward read.
    pub value: Tensor,
    /// The values that the optimiser updates; `None` if `value` is exact enough to be them.
    pub master: Option<Tensor>,
}

impl Parameter {
    fn new(device: &Device, spec: ParamSpec, policy: &PrecisionPolicy, stored: Option<Vec<f64>>) -> Result<Self> {
        let (storage, master) = match spec.role {
            ParamRole::Statistic => (policy.pointwise.accumulate, None),
            _ => {
                let storage = policy.weights_for(spec.precision(policy));
                (storage, policy.master.filter(|&master| master != storage))
            }
        };
        let shape = spec.stored_shape();
        let make = |precision, purpose| match &stored {
            Some(values) => Tensor::from_slice(device, values, shape.clone(), precision, purpose),
            None => device.alloc(shape.clone(), DType::real(precision), purpose),
        };
        let value = make(storage, Purpose::Param)?;
        let master = master.map(|precision| make(precision, Purpose::Master)).transpose()?;
        Ok(Parameter { spec, value, master })
    }

    /// The most exact values there are, in stored order.
    ///
    /// # Errors
    /// Those of reading the tensor.
    pub fn exact(&self) -> &Tensor {
        self.master.as_ref().unwrap_or(&self.value)
    }

    /// The most exact values in file order, complex elements as interleaved pairs.
    ///
    /// # Errors
    /// Those of reading the tensor.
    pub fn file_values(&self) -> Result<Vec<f64>> {
        Ok(self.spec.to_file(&self.exact().to_vec::<f64>()?))
    }

    /// Overwrites the values from file order.
    ///
    /// # Errors
    /// [`Error::Parameter`] if there are more or fewer values than the parameter has scalars.
    pub fn set_file_values(&mut self, values: &[f64]) -> Result<()> {
        if values.len() != self.spec.n_scalars() {
            let (expected, found) = (self.spec.n_scalars(), values.len());
            return Err(Error::Parameter { name: self.spec.name.clone(), expected, found });
        }
        let stored = self.spec.to_stored(values);
        self.value.copy_from_slice(&stored)?;
        if let Some(master) = &mut self.master {
            master.copy_from_slice(&stored)?;
        }
        Ok(())
    }
}

/// The parameters of a model, in the order of its specs.
#[derive(Debug, Default)]
pub struct Params {
    /// In the order of the model's specs.
    pub list: Vec<Parameter>,
}

impl Params {
    /// Allocates and initialises parameters in the precisions of `policy`. Each parameter draws
    /// from a random stream of its own, so adding one does not change the others.
    ///
    /// # Errors
    /// Those of allocation.
    pub fn new(device: &Device, specs: Vec<ParamSpec>, policy: &PrecisionPolicy, seed: u64) -> Result<Self> {
        let list = specs.into_iter().enumerate().map(|(idx, spec)| {
            let values = device.launches().then(|| initial_values(&spec, seed, idx as u64));
            Parameter::new(device, spec, policy, values)
        });
        Ok(Params { list: list.collect::<Result<_>>()? })
    }

    /// Real scalars of all parameters that gradients move.
    #[must_use]
    pub fn n_scalars(&self) -> usize {
        let moved = self.list.iter().filter(|param| param.spec.role != ParamRole::Statistic);
        moved.map(|param| param.spec.n_scalars()).sum()
    }

    /// Moves running statistics a tenth of the way to what a batch showed: `s = 0.9 s + 0.1 observed`, torch's
    /// default. One parameter may be observed several times, in order.
    ///
    /// # Errors
    /// Those of elementwise tensors, for an observation of another shape.
    pub fn observe(&mut self, observed: &[(LeafId, Tensor)]) -> Result<()> {
        for (LeafId(idx), value) in observed {
            let Some(param) = self.list.get_mut(*idx) else { continue };
            #[cfg(feature = "cuda")]
            if !value.device().is_cpu() && param.value.is_unshared() && param.value.shape() == value.shape() {
                on_gpu::observe(&mut param.value, value)?;
                continue;
            }
            let dtype = param.value.dtype();
            let inputs = [&param.value, value];
            param.value = Tensor::elementwise("observe", &Towards, &inputs, dtype, Purpose::Param)?;
        }
        Ok(())
    }

    /// Records every parameter as a leaf of the tape: leaf `i` is parameter `i` if nothing else was
    /// recorded before.
    pub fn leaves(&self, tape: &mut Tape) -> Vec<Var> {
        self.list.iter().map(|param| tape.leaf(param.value.clone())).collect()
    }

    /// The parameter of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.list.iter().find(|param| param.spec.name == name)
    }
}

/// Inputs: statistic, observation.
struct Towards;

impl Elementwise for Towards {
    fn tile<R: Real>(&self, inputs: &[&[R]], out: &mut [R]) {
        let (keep, take) = (R::from_f64(0.9), R::from_f64(0.1));
        out.iter_mut().zip(inputs[1]).for_each(|(s, seen)| *s = *s * keep + *seen * take);
    }

    #[cfg(feature = "cuda")]
    fn kernel(&self) -> Option<(Source, &'static str)> {
        Some((crate::pointwise::MAPS, "towards"))
    }
}

#[cfg(feature = "cuda")]
mod on_gpu {
    use crate::Result;
    use crate::pointwise::MAPS;
    use halfmode_tensor::Tensor;
    use halfmode_tensor::cuda::{count, define};

    /// In place: launches that are recorded and replayed find the statistic where it was.
    pub(super) fn observe(statistic: &mut Tensor, seen: &Tensor) -> Result<()> {
        let (device, n) = (seen.device(), seen.numel());
        let Some(cuda) = device.as_cuda().filter(|_| n > 0) else { return Ok(()) };
        let stored = statistic.precision();
        let defines = [define("S", stored), define("R", seen.precision()), define("T", stored)];
        let statistic = statistic.output()?;
        let args = [statistic, seen.input()?, statistic, count(n)];
        Ok(cuda.launch(MAPS, &defines, "towards", cuda.grid(n.div_ceil(4)), &args)?)
    }
}

fn initial_values(spec: &ParamSpec, seed: u64, stream: u64) -> Vec<f64> {
    use rand_chacha::ChaCha12Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let mut uniform = move || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut normal = {
        let mut uniform = uniform.clone();
        move || (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
    };
    let part = if spec.complex { std::f64::consts::FRAC_1_SQRT_2 } else { 1.0 };
    let file = (0..spec.n_scalars()).map(|_| match spec.init {
        Init::Uniform { bound } => bound * (2.0 * uniform() - 1.0),
        Init::Normal { std } => part * std * normal(),
        Init::Ones => 1.0,
        Init::Zeros => 0.0,
    });
    spec.to_stored(&file.collect::<Vec<_>>())
}
