//! Tensors in files of `torch.save`, read without Python.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use halfmode_precision::Domain;
use ndarray::{ArrayD, IxDyn};
use zip::ZipArchive;

use crate::error::{Error, Result};
use crate::npy_header::{ArrayInfo, NumpyType};
use crate::numpy::read_data;
use crate::pickle::{self, TensorRef, Value};
use crate::real::Real;
use crate::regular_file::open_regular;

/// An open file of `torch.save` (the zip format, torch 1.6 and later): a tensor, or a dictionary or
/// list of tensors, nested ones under dotted names. Nothing in the file is run.
pub struct TorchFile {
    archive: ZipArchive<BufReader<File>>,
    path: PathBuf,
    /// The folder inside the archive.
    folder: String,
    tensors: Vec<(String, Rc<TensorRef>)>,
}

impl std::fmt::Debug for TorchFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TorchFile").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The largest description of a file's contents that is read.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// Entries of nested containers that are looked at.
const MAX_ENTRIES: usize = 1 << 20;
/// Elements whose bytes can be counted.
const MAX_ELEMENTS: usize = 1 << 56;

impl TorchFile {
    /// Opens a file and reads its list of tensors; `None` if it is a zip archive of another kind.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Torch`].
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let refuse = |reason: String| Error::Torch { path: path.to_owned(), reason };
        let file = open_regular(path).map_err(|source| Error::Io { action: "open", path: path.to_owned(), source })?;
        let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|err| refuse(err.to_string()))?;
        let Some(name) = archive.file_names().find(|name| name.ends_with("/data.pkl")).map(str::to_owned) else {
            return Ok(None);
        };
        let folder = name.trim_end_matches("data.pkl").to_owned();
        let mut text = |name: &str, limit: u64| -> Result<Option<Vec<u8>>> {
            if archive.index_for_name(name).is_none() {
                return Ok(None);
            }
            let entry = archive.by_name(name).map_err(|err| refuse(err.to_string()))?;
            let mut bytes = Vec::new();
            entry.take(limit).read_to_end(&mut bytes).map_err(|err| refuse(err.to_string()))?;
            Ok(Some(bytes))
        };
        if text(&format!("{folder}byteorder"), 16)?.is_some_and(|order| order != b"little") {
            return Err(refuse("its numbers are not little-endian".to_owned()));
        }
        let bytes = text(&name, MAX_PICKLE_BYTES)?.unwrap_or_default();
        let value = pickle::parse(&bytes).map_err(|reason| refuse(format!("`{name}`: {reason}")))?;
        let mut tensors = Vec::new();
        collect(&value, String::new(), &mut tensors, &mut { MAX_ENTRIES });
        if tensors.is_empty() {
            return Err(refuse("there is no tensor in it".to_owned()));
        }
        if let Some((name, _)) = tensors.iter().find(|(_, tensor)| extent(tensor).is_none()) {
            return Err(refuse(format!("tensor `{name}` does not fit its storage")));
        }
        Ok(Some(TorchFile { archive, path: path.to_owned(), folder, tensors }))
    }

    /// Names of the tensors, in the file's order; a bare tensor is `tensor`.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        self.tensors.iter().map(|(name, _)| name.clone()).collect()
    }

    fn find(&self, key: &str) -> Result<Rc<TensorRef>> {
        let found = self.tensors.iter().find(|(name, _)| name == key);
        let missing = || Error::MissingKey { path: self.path.clone(), key: key.to_owned(), found: self.keys() };
        found.map(|(_, tensor)| Rc::clone(tensor)).ok_or_else(missing)
    }

    fn origin(&self, key: &str) -> String {
        format!("`{}[{key}]`", self.path.display())
    }

    /// Type and shape of one tensor.
    ///
    /// # Errors
    /// [`Error::MissingKey`] with the names that exist, [`Error::UnsupportedType`].
    pub fn info(&self, key: &str) -> Result<ArrayInfo> {
        let tensor = self.find(key)?;
        let dtype = dtype(&tensor.storage.kind).ok_or_else(|| Error::UnsupportedType {
            origin: self.origin(key),
            dtype: tensor.storage.kind.to_string(),
        })?;
        let (shape, domain) = (tensor.shape.clone(), Domain::Real);
        Ok(ArrayInfo { shape, dtype, domain, big_endian: false, fortran_order: false, header_bytes: 0 })
    }

    /// Reads one tensor, row-major, as `f32` or `f64`. Conversions are those of
    /// [`read_npy`](crate::numpy::read_npy).
    ///
    /// # Errors
    /// As [`TorchFile::info`], [`Error::Torch`] for a tensor that reaches beyond its storage,
    /// [`Error::Truncated`].
    pub fn read<T: Real>(&mut self, key: &str) -> Result<ArrayD<T>> {
        let (tensor, info, origin) = (self.find(key)?, self.info(key)?, self.origin(key));
        let refuse = |reason: String| Error::Torch { path: self.path.clone(), reason };
        let reach = extent(&tensor).ok_or_else(|| refuse(format!("tensor `{key}` does not fit its storage")))?;
        let name = format!("{}data/{}", self.folder, tensor.storage.key);
        let mut entry =
            self.archive.by_name(&name).map_err(|err| refuse(format!("entry `{name}` of tensor `{key}`: {err}")))?;
        // Only as far as the tensor reaches: headers may promise any size.
        let stored = read_data::<T>(&mut entry, &ArrayInfo { shape: vec![reach], ..info }, &origin)?;
        let stored = stored.into_raw_vec_and_offset().0;
        let shape = IxDyn(&tensor.shape);
        let strides = &tensor.strides;
        Ok(ArrayD::from_shape_fn(shape, |index| {
            let at = (0..strides.len()).map(|axis| index[axis] * strides[axis]).sum::<usize>();
            stored[tensor.offset + at]
        }))
    }
}

/// Scalars of the storage up to the last one that the tensor sees; `None` if that is beyond its end, or
/// if the tensor shows more elements than there are, as broadcast ones do.
fn extent(tensor: &TensorRef) -> Option<usize> {
    let numel = tensor.shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent))?;
    if numel == 0 {
        return Some(0);
    }
    let mut last = tensor.offset;
    for (&n, &stride) in tensor.shape.iter().zip(&tensor.strides) {
        last = last.checked_add((n - 1).checked_mul(stride)?)?;
    }
    let reach = last.checked_add(1)?;
    let fits = numel <= tensor.storage.numel && reach <= tensor.storage.numel && reach <= MAX_ELEMENTS;
    fits.then_some(reach)
}

fn dtype(kind: &str) -> Option<NumpyType> {
    Some(match kind.strip_prefix("torch ")? {
        "HalfStorage" => NumpyType::F16,
        "FloatStorage" => NumpyType::F32,
        "DoubleStorage" => NumpyType::F64,
        "BoolStorage" => NumpyType::Bool,
        "CharStorage" => NumpyType::I8,
        "ShortStorage" => NumpyType::I16,
        "IntStorage" => NumpyType::I32,
        "LongStorage" => NumpyType::I64,
        "ByteStorage" => NumpyType::U8,
        _ => return None,
    })
}

/// Tensors under dotted names. A small file can nest shared tuples to any number of entries, so there
/// is a budget of them.
fn collect(value: &Value, name: String, tensors: &mut Vec<(String, Rc<TensorRef>)>, budget: &mut usize) {
    if *budget == 0 {
        return;
    }
    *budget -= 1;
    let child = |part: &str| if name.is_empty() { part.to_owned() } else { format!("{name}.{part}") };
    match value {
        Value::Tensor(tensor) => {
            let name = if name.is_empty() { "tensor".to_owned() } else { name };
            tensors.push((name, Rc::clone(tensor)));
        }
        Value::Dict(pairs) => {
            for (key, value) in &pairs.entries {
                match key {
                    Value::Text(key) => collect(value, child(key), tensors, budget),
                    Value::Int(key) => collect(value, child(&key.to_string()), tensors, budget),
                    _ => {}
                }
            }
        }
        Value::Tuple(items) | Value::List(items) => {
            for (idx, value) in items.values.iter().enumerate() {
                collect(value, child(&idx.to_string()), tensors, budget);
            }
        }
        _ => {}
    }
}
