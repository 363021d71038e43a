//! Files of arrays, whatever their format: `.npz`, `.npy`, `.safetensors`, `.pt`, HDF5.

use crate::cli::error::{CliError, Exit};
use crate::cli::memory;
use halfmode::data::numpy::{npy_info, read_npy};
use halfmode::data::{ArrayInfo, Hdf5File, Hdf5Info, LeftOut, NpzFile, TorchFile, open_regular};
use halfmode::precision::Domain;
use halfmode::train::{Array, Values, read_named};
use ndarray::{ArrayD, IxDyn};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// What a file is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Npz,
    Npy,
    Safetensors,
    Torch,
    Hdf5,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Npz => "npz",
            Kind::Npy => "npy",
            Kind::Safetensors => "safetensors",
            Kind::Torch => "torch",
            Kind::Hdf5 => "hdf5",
        }
    }
}

/// An open file.
pub(crate) struct ArrayFile {
    path: PathBuf,
    source: Source,
}

enum Source {
    Npz(Box<NpzFile<BufReader<File>>>),
    Npy(ArrayInfo),
    Safetensors(BTreeMap<String, Array>, Value),
    Torch(Box<TorchFile>),
    Hdf5(Box<Hdf5File>),
}

/// Why a file that is none of these is not read, and what makes one of it that is, if its first bytes tell.
fn relative_of_hdf5(start: &[u8]) -> Option<(&'static str, &'static str)> {
    if start.starts_with(b"MATLAB 5.0 MAT-file") {
        let convert = "save it in MATLAB with save('data.mat', '-v7.3'), or in Python: d = scipy.io.loadmat('data.mat'); \
            numpy.savez('data.npz', **{k: d[k] for k in d if k[0] != '_'})";
        return Some(("MATLAB files of version 5 are not read, those of 7.3 are", convert));
    }
    if start.starts_with(b"CDF\x01") || start.starts_with(b"CDF\x02") || start.starts_with(b"CDF\x05") {
        return Some(("classic NetCDF files are not read, those of NetCDF-4 are", "nccopy -k nc4 data.nc data4.nc"));
    }
    None
}

/// The name of the type of a data set's numbers.
fn hdf5_dtype(info: &Hdf5Info) -> String {
    if info.complex { format!("c{}", info.dtype.name()) } else { info.dtype.name().to_owned() }
}

/// The type of the values of a tensor in a safetensors file.
fn dtype_of(values: &Values) -> &'static str {
    values.view().precision().name()
}

impl ArrayFile {
    /// Looks at the first bytes, and reads what says which arrays there are.
    pub(crate) fn open(path: &Path) -> Result<Self, CliError> {
        let place = path.display().to_string();
        let refuse = |what: &str, why: String| CliError::new(Exit::Data, what).at(place.clone()).why(why);
        let mut start = Vec::new();
        let opened = open_regular(path).and_then(|file| file.take(64).read_to_end(&mut start));
        opened.map_err(|err| {
            let err = refuse("the file cannot be read", err.to_string());
            err.help(format!("halfmode data generate darcy --output {place}"))
        })?;
        let source = if start.starts_with(b"\x93NUMPY") {
            Source::Npy(npy_info(path)?)
        } else if start.starts_with(b"PK") && path.extension().is_some_and(|extension| extension == "npz") {
            Source::Npz(Box::new(NpzFile::open(path)?))
        } else if start.starts_with(b"PK") {
            match TorchFile::open(path)? {
                Some(torch) => Source::Torch(Box::new(torch)),
                None => Source::Npz(Box::new(NpzFile::open(path)?)),
            }
        } else if let Some((what, convert)) = relative_of_hdf5(&start) {
            return Err(refuse(what, format!("convert it: {convert}")));
        } else if let Some(hdf5) = Hdf5File::open(path)? {
            Source::Hdf5(Box::new(hdf5))
        } else {
            let bytes = std::fs::metadata(path).map_or(0, |about| about.len());
            memory::check("the file", usize::try_from(bytes).unwrap_or(usize::MAX))
                .map_err(|err| err.at(path.display().to_string()))?;
            match read_named(path) {
                Ok((arrays, metadata)) => Source::Safetensors(arrays, metadata),
                Err(err) if path.extension().is_some_and(|extension| extension == "safetensors") => {
                    return Err(err.into());
                }
                Err(err) => {
                    return Err(refuse("this is no .npz, .npy, .safetensors, .pt or HDF5 file", err.to_string()));
                }
            }
        };
        Ok(ArrayFile { path: path.to_owned(), source })
    }

    pub(crate) fn kind(&self) -> Kind {
        match self.source {
            Source::Npz(_) => Kind::Npz,
            Source::Npy(_) => Kind::Npy,
            Source::Safetensors(..) => Kind::Safetensors,
            Source::Torch(_) => Kind::Torch,
            Source::Hdf5(_) => Kind::Hdf5,
        }
    }

    /// What halfmode wrote beside the tensors.
    pub(crate) fn metadata(&self) -> Option<&Value> {
        match &self.source {
            Source::Safetensors(_, metadata) => Some(metadata).filter(|metadata| metadata.is_object()),
            _ => None,
        }
    }

    /// Names of the arrays; the one of an `.npy` file is the file's stem.
    pub(crate) fn names(&self) -> Vec<String> {
        match &self.source {
            Source::Npz(npz) => npz.keys(),
            Source::Npy(_) => {
                vec![self.path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())]
            }
            Source::Safetensors(arrays, _) => arrays.keys().cloned().collect(),
            Source::Torch(torch) => torch.keys(),
            Source::Hdf5(hdf5) => hdf5.keys(),
        }
    }

    /// What is in the file beside arrays of numbers.
    pub(crate) fn left_out(&self) -> &[LeftOut] {
        match &self.source {
            Source::Hdf5(hdf5) => hdf5.left_out(),
            _ => &[],
        }
    }

    /// Refuses an array that the memory cannot hold, with `width` bytes per value: a small archive may
    /// unpack to any size.
    fn check_memory(&mut self, name: &str, width: usize) -> Result<(), CliError> {
        let (n_elements, width) = match &mut self.source {
            Source::Npz(npz) => (npz.info(name)?.n_elements(), width),
            Source::Torch(torch) => (torch.info(name)?.n_elements(), width),
            Source::Npy(info) => (info.n_elements(), width),
            // Its bytes are there as a whole while they are converted.
            Source::Hdf5(hdf5) => {
                let info = hdf5.info(name)?;
                (info.shape.iter().product(), width + info.dtype.size())
            }
            Source::Safetensors(..) => return Ok(()),
        };
        memory::check(&format!("array `{name}`"), n_elements.saturating_mul(width))
            .map_err(|err| err.at(self.path.display().to_string()))
    }

    /// Type, shape and values of one array.
    pub(crate) fn read_f64(&mut self, name: &str) -> Result<(String, Vec<usize>, Vec<f64>), CliError> {
        self.check_memory(name, 8)?;
        match &mut self.source {
            Source::Npz(npz) => {
                let info = npz.info(name)?;
                let array = npz.read::<f64>(name)?;
                Ok((info.type_name(), info.shape, array.into_raw_vec_and_offset().0))
            }
            Source::Torch(torch) => {
                let info = torch.info(name)?;
                let array = torch.read::<f64>(name)?;
                Ok((info.type_name(), info.shape, array.into_raw_vec_and_offset().0))
            }
            Source::Hdf5(hdf5) => {
                let info = hdf5.info(name)?;
                let array = hdf5.read::<f64>(name)?;
                Ok((hdf5_dtype(&info), info.shape, array.into_raw_vec_and_offset().0))
            }
            Source::Npy(info) => {
                let array = read_npy::<f64>(&self.path)?;
                Ok((info.type_name(), info.shape.clone(), array.into_raw_vec_and_offset().0))
            }
            Source::Safetensors(arrays, _) => {
                let array =
                    arrays.get(name).ok_or_else(|| CliError::new(Exit::Data, format!("there is no array `{name}`")))?;
                Ok((dtype_of(&array.values).to_owned(), array.shape.clone(), array.to_f64()))
            }
        }
    }

    /// The array to use when the user named none: `x`, or the only one.
    fn choose(&self, key: Option<&str>) -> Result<String, CliError> {
        let names = self.names();
        let refuse = |what: String| {
            let shown = names.iter().take(16).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let err = CliError::new(Exit::Data, what).at(self.path.display().to_string());
            err.why(format!("it holds {shown}")).help(format!("halfmode data inspect {}", self.path.display()))
        };
        match (key, names.as_slice()) {
            (Some(key), _) if names.iter().any(|name| name == key) => Ok(key.to_owned()),
            // An `.npy` file has one array without a name.
            (Some(_), [only]) if self.kind() == Kind::Npy => Ok(only.clone()),
            (Some(key), _) => Err(refuse(format!("there is no array `{key}`"))),
            (None, [only]) => Ok(only.clone()),
            (None, _) if names.iter().any(|name| name == "x") => Ok("x".to_owned()),
            (None, _) => Err(refuse("--key is needed to choose an array".to_owned())),
        }
    }

    /// Whether an array holds complex numbers, which are read as pairs.
    pub(crate) fn domain(&mut self, name: &str) -> Result<Domain, CliError> {
        Ok(match &mut self.source {
            Source::Npz(npz) => npz.info(name)?.domain,
            Source::Npy(info) => info.domain,
            Source::Hdf5(hdf5) if hdf5.info(name)?.complex => Domain::Complex,
            Source::Hdf5(_) => Domain::Real,
            Source::Torch(_) | Source::Safetensors(..) => Domain::Real,
        })
    }

    /// One array in f32.
    pub(crate) fn read_f32(&mut self, key: Option<&str>) -> Result<(String, ArrayD<f32>), CliError> {
        let name = self.choose(key)?;
        self.check_memory(&name, 8)?;
        let array = match &mut self.source {
            Source::Npz(npz) => npz.read::<f32>(&name)?,
            Source::Torch(torch) => torch.read::<f32>(&name)?,
            Source::Hdf5(hdf5) => hdf5.read::<f32>(&name)?,
            Source::Npy(_) => read_npy::<f32>(&self.path)?,
            Source::Safetensors(arrays, _) => {
                let array = arrays
                    .get(&name)
                    .ok_or_else(|| CliError::new(Exit::Data, format!("there is no array `{name}`")))?;
                let mut values = vec![0f32; array.values.view().len()];
                match array.values.view() {
                    halfmode::tensor::View::F64(wide) => {
                        values.iter_mut().zip(wide).for_each(|(to, &from)| *to = from as f32)
                    }
                    other => other.widen(&mut values),
                }
                let shaped = ArrayD::from_shape_vec(IxDyn(&array.shape), values);
                shaped.map_err(|err| CliError::new(Exit::Data, err.to_string()).at(self.path.display().to_string()))?
            }
        };
        Ok((name, array))
    }
}
