//! Named tensors in safetensors files: models, optimiser states, imported weights.
//!
//! A file is written whole or not at all. Reading trusts nothing: the header's claims are checked
//! against the file's size before anything of that size is allocated.

use crate::{Corruption, Error, Result, atomic_write_with};
use half::{bf16, f16};
use halfmode_data::open_regular;
use halfmode_nn::{ParamSpec, Parameter, Params};
use halfmode_precision::{Domain, Precision};
use halfmode_tensor::{Shape, Tensor, View};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// The key of this library's JSON in the file's metadata.
const KEY: &str = "halfmode";
/// The key of the checksum there.
const CHECKSUM: &str = "halfmode.sha256";
/// Longest header that is read: some hundred thousand tensors.
const MAX_HEADER_BYTES: u64 = 1 << 25;
/// Scalars that are converted from and to bytes at a time.
const CHUNK: usize = 1 << 14;

/// Scalars in one of the storage precisions.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// binary64
    F64(Vec<f64>),
    /// binary32
    F32(Vec<f32>),
    /// bfloat16
    Bf16(Vec<bf16>),
    /// binary16
    F16(Vec<f16>),
}

impl Values {
    /// The scalars as a view.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        match self {
            Values::F64(values) => View::F64(values),
            Values::F32(values) => View::F32(values),
            Values::Bf16(values) => View::Bf16(values),
            Values::F16(values) => View::F16(values),
        }
    }

    fn copied(view: View<'_>) -> Self {
        match view {
            View::F64(values) => Values::F64(values.to_vec()),
            View::F32(values) => Values::F32(values.to_vec()),
            View::Bf16(values) => Values::Bf16(values.to_vec()),
            View::F16(values) => Values::F16(values.to_vec()),
        }
    }

    /// A copy of a tensor's scalars on the host.
    fn of(tensor: &Tensor) -> Result<Self> {
        Ok(match tensor.precision() {
            Precision::F64 => Values::F64(tensor.to_vec()?),
            Precision::F32 => Values::F32(tensor.to_vec()?),
            Precision::Bf16 => Values::Bf16(tensor.to_vec()?.into_iter().map(bf16::from_f32).collect()),
            Precision::F16 => Values::F16(tensor.to_vec()?.into_iter().map(f16::from_f32).collect()),
        })
    }

    fn to_file(spec: &ParamSpec, stored: View<'_>) -> Self {
        match stored {
            View::F64(values) => Values::F64(spec.to_file(values)),
            View::F32(values) => Values::F32(spec.to_file(values)),
            View::Bf16(values) => Values::Bf16(spec.to_file(values)),
            View::F16(values) => Values::F16(spec.to_file(values)),
        }
    }

    fn to_stored(&self, spec: &ParamSpec) -> Self {
        match self {
            Values::F64(values) => Values::F64(spec.to_stored(values)),
            Values::F32(values) => Values::F32(spec.to_stored(values)),
            Values::Bf16(values) => Values::Bf16(spec.to_stored(values)),
            Values::F16(values) => Values::F16(spec.to_stored(values)),
        }
    }
}

/// A tensor of a file: its shape and its scalars as they were stored. Complex tensors have a
/// trailing axis of length 2 (re, im), whether the file has them so or as C64.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Row-major.
    pub values: Values,
}

impl Array {
    /// The scalars in double precision, exactly.
    #[must_use]
    pub fn to_f64(&self) -> Vec<f64> {
        let view = self.values.view();
        let mut wide = vec![0.0; view.len()];
        view.widen(&mut wide);
        wide
    }

    /// Overwrites a real tensor of the same shape, rounding if its precision is another. `name` is
    /// for errors.
    ///
    /// # Errors
    /// [`Error::TensorShape`], and those of [`Tensor::view_mut`].
    pub fn write_to(&self, name: &str, tensor: &mut Tensor) -> Result<()> {
        self.check_shape(name, tensor.shape())?;
        write(self.values.view(), tensor)
    }

    fn check_shape(&self, name: &str, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        let (expected, found) = (Shape::new(expected), Shape::new(&self.shape));
        Err(Error::TensorShape { name: name.to_owned(), expected, found })
    }
}

/// Rounds `values` to a tensor with as many scalars.
fn write(values: View<'_>, tensor: &mut Tensor) -> Result<()> {
    match values {
        View::F32(values) => tensor.copy_from_slice(values)?,
        View::F64(values) => tensor.copy_from_slice(values)?,
        halves => {
            let mut wide = vec![0f32; halves.len()];
            halves.widen(&mut wide);
            tensor.copy_from_slice(&wide)?;
        }
    }
    Ok(())
}

/// A tensor that is to be written. Values are borrowed, those of a GPU copied; what must be reordered for the
/// file is reordered when its turn comes.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    name: String,
    shape: Vec<usize>,
    source: Source<'a>,
}

#[derive(Clone, Debug)]
enum Source<'a> {
    View(View<'a>),
    Stored(&'a ParamSpec, View<'a>),
    Owned(Values),
}

impl<'a> Entry<'a> {
    /// A tensor as it is; a complex one gets a trailing axis of length 2.
    ///
    /// # Errors
    /// [`halfmode_tensor::Error::NoValues`] on the planning device.
    pub fn tensor(name: impl Into<String>, tensor: &'a Tensor) -> Result<Self> {
        let mut shape = tensor.shape().to_vec();
        if tensor.dtype().domain == Domain::Complex {
            shape.push(2);
        }
        let source = match tensor.view() {
            #[cfg(feature = "cuda")]
            Err(halfmode_tensor::Error::OnGpu) => Source::Owned(Values::of(tensor)?),
            view => Source::View(view?),
        };
        Ok(Entry { name: name.into(), shape, source })
    }

    /// The most exact values of a parameter, under its name, in the file's shape and order; complex
    /// ones with a trailing axis of length 2.
    ///
    /// # Errors
    /// [`halfmode_tensor::Error::NoValues`] on the planning device.
    pub fn parameter(param: &'a Parameter) -> Result<Self> {
        let source = match param.exact().view() {
            #[cfg(feature = "cuda")]
            Err(halfmode_tensor::Error::OnGpu) => {
                Source::Owned(Values::to_file(&param.spec, Values::of(param.exact())?.view()))
            }
            view => Source::Stored(&param.spec, view?),
        };
        Ok(Entry { name: param.spec.name.clone(), shape: file_shape(&param.spec), source })
    }

    /// All parameters of a model.
    ///
    /// # Errors
    /// Those of [`Entry::parameter`].
    pub fn parameters(params: &'a Params) -> Result<Vec<Self>> {
        params.list.iter().map(Entry::parameter).collect()
    }

    /// Values that are given away; their number is checked against `shape` when they are written.
    #[must_use]
    pub fn values(name: impl Into<String>, shape: &[usize], values: Values) -> Self {
        Entry { name: name.into(), shape: shape.to_vec(), source: Source::Owned(values) }
    }

    /// Borrowed values; their number is checked against `shape` when they are written.
    #[must_use]
    pub fn view(name: impl Into<String>, shape: &[usize], view: View<'a>) -> Self {
        Entry { name: name.into(), shape: shape.to_vec(), source: Source::View(view) }
    }

    /// The same under another name.
    #[must_use]
    pub fn renamed(self, name: impl Into<String>) -> Self {
        Entry { name: name.into(), ..self }
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn scalars(&self) -> View<'_> {
        match &self.source {
            Source::View(view) | Source::Stored(_, view) => *view,
            Source::Owned(values) => values.view(),
        }
    }

    /// The scalars in the file's order.
    fn in_file_order(&self) -> Cow<'_, Values> {
        match &self.source {
            Source::Stored(spec, view) => Cow::Owned(Values::to_file(spec, *view)),
            Source::View(view) => Cow::Owned(Values::copied(*view)),
            Source::Owned(values) => Cow::Borrowed(values),
        }
    }
}

/// The shape of a parameter in a file.
fn file_shape(spec: &ParamSpec) -> Vec<usize> {
    let mut shape = spec.file_shape.clone();
    if spec.complex {
        shape.push(2);
    }
    shape
}

/// Writes tensors and `metadata` to a safetensors file, whole or not at all. The same arguments
/// give the same bytes.
///
/// # Errors
/// [`Error::DiskFull`], [`Error::NotWritable`], [`Error::Io`]; [`Error::TensorName`] for a name used
/// twice, [`Error::Length`] for values that do not fill their shape. `path` then keeps what it had.
pub fn write_named(path: impl AsRef<Path>, entries: &[Entry<'_>], metadata: &Value) -> Result<()> {
    let path = path.as_ref();
    // Wide scalars first keep all of them aligned in the file.
    let mut order: Vec<&Entry<'_>> = entries.iter().collect();
    order.sort_by_key(|entry| (std::cmp::Reverse(entry.scalars().precision().bytes()), &entry.name));
    let text = serde_json::to_string(metadata).map_err(to_json)?;
    let mut checksum = Checksum::of(&text);
    for entry in &order {
        checksum.begin(&entry.name);
        put_entry(entry, &mut |bytes| {
            checksum.add(bytes);
            Ok(())
        })?;
    }
    let header = header(&order, text, checksum.hex())?;
    atomic_write_with(path, |file| {
        let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(|err| Error::write(path, err));
        put(&(header.len() as u64).to_le_bytes())?;
        put(&header)?;
        order.into_iter().try_for_each(|entry| put_entry(entry, &mut put))
    })
}

/// SHA-256 of metadata, names and scalars: a bit that a disk has turned is noticed.
struct Checksum(Sha256);

impl Checksum {
    /// Of the metadata's text, so far.
    fn of(metadata: &str) -> Self {
        Checksum(Sha256::new_with_prefix(metadata))
    }

    /// A tensor comes next.
    fn begin(&mut self, name: &str) {
        self.0.update((name.len() as u64).to_le_bytes());
        self.0.update(name);
    }

    fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn hex(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

fn to_json(source: serde_json::Error) -> Error {
    Error::ToJson { what: "the header of a checkpoint", source }
}

fn put_entry(entry: &Entry<'_>, put: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut bytes = Vec::with_capacity(8 * CHUNK);
    match entry.source {
        Source::View(view) => put_scalars(view, &mut bytes, put),
        _ => put_scalars(entry.in_file_order().view(), &mut bytes, put),
    }
}

fn header(entries: &[&Entry<'_>], text: String, checksum: String) -> Result<Vec<u8>> {
    let mut infos: Vec<(String, TensorInfo)> = Vec::with_capacity(entries.len());
    let mut names = std::collections::HashSet::new();
    let mut end = 0;
    for entry in entries {
        if entry.name == "__metadata__" || !names.insert(&entry.name) {
            return Err(Error::TensorName { name: entry.name.clone() });
        }
        let (shape, scalars) = (Shape::new(&entry.shape), entry.scalars());
        if shape.checked_numel() != Some(scalars.len()) {
            let expected = shape.checked_numel().unwrap_or(usize::MAX);
            return Err(Error::Length { op: "write_named", operand: "values", expected, found: scalars.len() });
        }
        let dtype = match scalars.precision() {
            Precision::F64 => Dtype::F64,
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::BF16,
            Precision::F16 => Dtype::F16,
        };
        let start = end;
        end += scalars.len() * scalars.precision().bytes();
        infos.push((entry.name.clone(), TensorInfo { dtype, shape: entry.shape.clone(), data_offsets: (start, end) }));
    }
    // Offsets and shapes were just made to fit, so the only failure left is a bug of ours; it is
    // reported as one of JSON rather than hidden.
    let about = HashMap::from([(KEY.to_owned(), text), (CHECKSUM.to_owned(), checksum)]);
    let metadata = Metadata::new(Some(about), infos).map_err(|err| to_json(serde::ser::Error::custom(err)))?;
    // A value has its keys in order; the map of the metadata has them in any.
    let metadata = serde_json::to_value(&metadata).map_err(to_json)?;
    let mut header = serde_json::to_vec(&metadata).map_err(to_json)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

fn put_scalars(view: View<'_>, bytes: &mut Vec<u8>, put: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut start = 0;
    while start < view.len() {
        let end = (start + CHUNK).min(view.len());
        bytes.clear();
        match view.slice(start..end) {
            View::F64(values) => values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes())),
            View::F32(values) => values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes())),
            View::Bf16(values) => values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes())),
            View::F16(values) => values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes())),
        }
        put(bytes)?;
        start = end;
    }
    Ok(())
}

/// All tensors of a safetensors file by name, and this library's metadata ([`Value::Null`] if the
/// file is from elsewhere).
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Corrupt`] if it is not what its format says,
/// [`Error::DType`] for tensors that are not floats.
///
/// ```
/// # use halfmode_train::{read_named, write_named, Entry, Values};
/// # let path = std::env::temp_dir().join(format!("halfmode-doc-{}.safetensors", std::process::id()));
/// let entry = Entry::values("bias", &[2], Values::F32(vec![0.1, 0.2]));
/// write_named(&path, &[entry], &serde_json::json!({"format_version": 1}))?;
/// let (arrays, metadata) = read_named(&path)?;
/// assert_eq!(arrays["bias"].values, Values::F32(vec![0.1, 0.2]));
/// assert_eq!(metadata["format_version"], 1);
/// # std::fs::remove_file(&path).unwrap();
/// # Ok::<(), halfmode_train::Error>(())
/// ```
pub fn read_named(path: impl AsRef<Path>) -> Result<(BTreeMap<String, Array>, Value)> {
    let path = path.as_ref();
    let refused = |err| Error::read(path, err);
    let corrupt = |reason| Error::Corrupt { path: path.to_owned(), reason };
    let mut file = open_regular(path).map_err(refused)?;
    let file_bytes = file.metadata().map_err(refused)?.len();
    if file_bytes < 8 {
        return Err(corrupt(Corruption::TooShort { bytes: file_bytes }));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(refused)?;
    let header_bytes = u64::from_le_bytes(length);
    let limit = MAX_HEADER_BYTES;
    if header_bytes > limit || header_bytes > file_bytes - 8 {
        return Err(corrupt(Corruption::HeaderLength { header_bytes, file_bytes, limit }));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(&mut header).map_err(refused)?;
    // Reading it checks that offsets are in order and that each range is as long as its shape.
    let header: Metadata = serde_json::from_slice(&header).map_err(|err| corrupt(Corruption::Header(err)))?;
    let (expected, found) = (header.data_len() as u64, file_bytes - 8 - header_bytes);
    if expected != found {
        return Err(corrupt(Corruption::DataLength { expected, found }));
    }
    let about = |key: &str| header.metadata().as_ref().and_then(|metadata| metadata.get(key));
    let text = about(KEY);
    let mut checksum = Checksum::of(text.map_or("", String::as_str));
    let mut arrays = BTreeMap::new();
    for name in header.offset_keys() {
        let Some(info) = header.info(&name) else { continue };
        checksum.begin(&name);
        let array = read_array(path, &mut file, &name, info, &mut checksum)?;
        arrays.insert(name, array);
    }
    // Files from elsewhere have none.
    if about(CHECKSUM).is_some_and(|written| *written != checksum.hex()) {
        return Err(corrupt(Corruption::Checksum));
    }
    let metadata = text.map(|text| serde_json::from_str(text)).transpose();
    Ok((arrays, metadata.map_err(|err| corrupt(Corruption::Metadata(err)))?.unwrap_or(Value::Null)))
}

fn read_array(path: &Path, file: &mut File, name: &str, info: &TensorInfo, checksum: &mut Checksum) -> Result<Array> {
    let bytes = info.data_offsets.1 - info.data_offsets.0;
    let reader = Scalars { path, name, bytes, file, checksum };
    let mut shape = info.shape.clone();
    let values = match info.dtype {
        Dtype::F64 => Values::F64(reader.read(f64::from_le_bytes)?),
        Dtype::F32 => Values::F32(reader.read(f32::from_le_bytes)?),
        Dtype::BF16 => Values::Bf16(reader.read(bf16::from_le_bytes)?),
        Dtype::F16 => Values::F16(reader.read(f16::from_le_bytes)?),
        // Counters, such as those of batch norms.
        Dtype::I64 => Values::F64(reader.read(|bytes| i64::from_le_bytes(bytes) as f64)?),
        Dtype::C64 => {
            shape.push(2);
            Values::F32(reader.read(f32::from_le_bytes)?)
        }
        dtype => return Err(Error::DType { path: path.to_owned(), name: name.to_owned(), dtype }),
    };
    Ok(Array { shape, values })
}

/// The bytes of one tensor, next in the file.
struct Scalars<'a> {
    path: &'a Path,
    name: &'a str,
    bytes: usize,
    file: &'a mut File,
    checksum: &'a mut Checksum,
}

impl Scalars<'_> {
    fn read<T, const N: usize>(self, from: impl Fn([u8; N]) -> T) -> Result<Vec<T>> {
        let Scalars { path, name, bytes, file, checksum } = self;
        let mut values = Vec::new();
        if values.try_reserve_exact(bytes / N).is_err() {
            let reason = Corruption::TooLarge { name: name.to_owned(), bytes };
            return Err(Error::Corrupt { path: path.to_owned(), reason });
        }
        let mut buffer = vec![0; bytes.min(N * CHUNK)];
        let mut left = bytes;
        while left > 0 {
            let piece = &mut buffer[..left.min(N * CHUNK)];
            file.read_exact(piece).map_err(|err| Error::read(path, err))?;
            checksum.add(piece);
            let (scalars, _) = piece.as_chunks::<N>();
            values.extend(scalars.iter().map(|bytes| from(*bytes)));
            left -= piece.len();
        }
        Ok(values)
    }
}

/// Overwrites parameters with the tensors of their names. Masters that were written by
/// [`Entry::parameter`] come back bit for bit, and copies are rounded from them as the optimiser
/// does. Tensors that no parameter has are left alone.
///
/// # Errors
/// [`Error::MissingTensor`] and [`Error::TensorShape`] before anything is changed, and those of
/// [`Tensor::view_mut`].
pub fn load_parameters(params: &mut Params, arrays: &BTreeMap<String, Array>) -> Result<()> {
    for param in &params.list {
        let name = &param.spec.name;
        let array = arrays.get(name).ok_or_else(|| Error::MissingTensor { name: name.clone() })?;
        array.check_shape(name, &file_shape(&param.spec))?;
    }
    for param in &mut params.list {
        let Some(array) = arrays.get(&param.spec.name) else { continue };
        let stored = array.values.to_stored(&param.spec);
        match &mut param.master {
            Some(master) => {
                write(stored.view(), master)?;
                write(Values::of(master)?.view(), &mut param.value)?;
            }
            None => write(stored.view(), &mut param.value)?,
        }
    }
    Ok(())
}
