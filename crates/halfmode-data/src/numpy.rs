//! `.npy` files: one array each, read as `f32` or `f64` whatever type they hold. Complex arrays get a last axis
//! of 2, real and imaginary part.
//!
//! Reading never trusts a header: memory grows with the data that is really there.
//! For `.npz` archives see [`NpzFile`](crate::NpzFile) and [`write_npz`].

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use half::f16;
use halfmode_precision::Domain;
use ndarray::{ArrayD, ArrayViewD, CowArray, IxDyn, ShapeBuilder};
use ndarray_npy::{NpzWriter, WriteNpyError, WriteNpyExt, WriteNpzError};

use crate::atomic_file::write_atomically;
use crate::error::{Error, Result};
use crate::npy_header::{ArrayInfo, NumpyType, read_header};
use crate::real::Real;
use crate::regular_file::open_regular;

/// Bytes converted at a time; a multiple of every element size.
const CHUNK: usize = 1 << 16;
/// Elements reserved on the word of a header alone.
const TRUSTED_ELEMENTS: usize = 1 << 16;

/// Reads a `.npy` file; `T` is `f32` or `f64`.
///
/// Booleans become 0 and 1. Integers and doubles are rounded to nearest if `T` cannot hold them;
/// doubles beyond the range of `f32` become infinite.
///
/// # Shapes
/// - returns the file's shape, row-major whatever the file's order; complex elements become a last axis of 2
///
/// # Errors
/// [`Error::Io`], [`Error::NpyHeader`], [`Error::UnsupportedType`], [`Error::Truncated`].
pub fn read_npy<T: Real>(path: &Path) -> Result<ArrayD<T>> {
    let (mut reader, info, origin) = open(path)?;
    read_data(&mut reader, &info, &origin)
}

/// Reads only the header of a `.npy` file.
///
/// # Errors
/// [`Error::Io`], [`Error::NpyHeader`], [`Error::UnsupportedType`], [`Error::Truncated`].
pub fn npy_info(path: &Path) -> Result<ArrayInfo> {
    open(path).map(|(_, info, _)| info)
}

/// Writes a `.npy` file atomically, row-major.
///
/// # Errors
/// [`Error::Io`]; an existing file is then unchanged.
pub fn write_npy<T: Real>(path: &Path, array: &ArrayViewD<'_, T>) -> Result<()> {
    let fill = |writer: &mut BufWriter<File>| {
        dense(array).write_npy(&mut *writer).map_err(|error| write_error(path, npy_to_io(error)))
    };
    write_atomically(path, fill, |source| write_error(path, source))
}

/// An array to put into an archive.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum NpzArray<'a> {
    /// Single precision.
    F32(ArrayViewD<'a, f32>),
    /// Double precision.
    F64(ArrayViewD<'a, f64>),
    /// Bytes.
    U8(ArrayViewD<'a, u8>),
}

/// Writes an uncompressed `.npz` archive atomically; NumPy's `np.load` reads it.
///
/// # Errors
/// [`Error::Io`]; an existing file is then unchanged.
pub fn write_npz(path: &Path, arrays: &[(&str, NpzArray<'_>)]) -> Result<()> {
    let fill = |writer: &mut BufWriter<File>| {
        let mut writer = FirstError { writer: &mut *writer, error: None };
        let mut npz = NpzWriter::new(&mut writer);
        for (name, array) in arrays {
            match array {
                NpzArray::F32(a) => npz.add_array(*name, &dense(a)),
                NpzArray::F64(a) => npz.add_array(*name, &dense(a)),
                NpzArray::U8(a) => npz.add_array(*name, &dense(a)),
            }
            .map_err(|error| write_error(path, npz_to_io(error)))?;
        }
        let finished = npz.finish().map(|_| ()).map_err(npz_to_io);
        let outcome = writer.error.take().map_or(finished, Err).and_then(|()| writer.writer.flush());
        outcome.map_err(|source| write_error(path, source))
    };
    write_atomically(path, fill, |source| write_error(path, source))
}

/// A writer that keeps its first error and then takes everything: the zip layer answers an error by
/// finishing the archive, and talks on stderr when that fails, too.
struct FirstError<'a> {
    writer: &'a mut BufWriter<File>,
    error: Option<std::io::Error>,
}

impl FirstError<'_> {
    fn attempt<T>(
        &mut self,
        otherwise: T,
        action: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<T>,
    ) -> std::io::Result<T> {
        if self.error.is_some() {
            return Ok(otherwise);
        }
        Ok(action(self.writer).unwrap_or_else(|error| {
            self.error = Some(error);
            otherwise
        }))
    }
}

impl Write for FirstError<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.attempt(bytes.len(), |writer| writer.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.attempt((), Write::flush)
    }
}

impl Seek for FirstError<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.attempt(0, |writer| writer.seek(to))
    }
}

/// The array in row-major order with the strides that its shape alone implies. Axes of length 0 or 1
/// may have any others, and `ndarray-npy` panics where they do.
fn dense<'a, T: Copy>(array: &'a ArrayViewD<'_, T>) -> CowArray<'a, T, IxDyn> {
    let standard = array.as_standard_layout();
    if standard.as_slice_memory_order().is_some() {
        return standard;
    }
    let rebuilt = ArrayD::from_shape_vec(array.raw_dim(), array.iter().copied().collect());
    rebuilt.map_or(standard, CowArray::from)
}

fn write_error(path: &Path, source: std::io::Error) -> Error {
    Error::Io { action: "write", path: path.to_owned(), source }
}

fn npy_to_io(error: WriteNpyError) -> std::io::Error {
    match error {
        WriteNpyError::Io(error) => error,
        other => std::io::Error::other(other.to_string()),
    }
}

fn npz_to_io(error: WriteNpzError) -> std::io::Error {
    match error {
        WriteNpzError::Npy(error) => npy_to_io(error),
        WriteNpzError::Zip(zip::result::ZipError::Io(error)) => error,
        other => std::io::Error::other(other.to_string()),
    }
}

fn open(path: &Path) -> Result<(BufReader<File>, ArrayInfo, String)> {
    let origin = format!("`{}`", path.display());
    let io = |source| Error::Io { action: "open", path: path.to_owned(), source };
    let file = open_regular(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    let mut reader = BufReader::new(file);
    let info = read_header(&mut reader, &origin)?;
    let found = metadata.len().saturating_sub(info.header_bytes);
    if found < info.n_bytes() {
        return Err(Error::Truncated { origin, expected: info.n_bytes(), found });
    }
    Ok((reader, info, origin))
}

/// Reads and converts the data that follows a header.
pub(crate) fn read_data<T: Real>(
    reader: &mut (impl Read + ?Sized),
    info: &ArrayInfo,
    origin: &str,
) -> Result<ArrayD<T>> {
    let expected = info.n_bytes();
    let size = info.dtype.size();
    let mut values: Vec<T> = Vec::with_capacity(info.n_elements().min(TRUSTED_ELEMENTS));
    let mut buffer = vec![0u8; CHUNK];
    let mut found = 0u64;
    while found < expected {
        let wanted = (expected - found).min(CHUNK as u64) as usize;
        let got = read_up_to(reader, &mut buffer[..wanted]).map_err(|error| Error::NpyHeader {
            origin: origin.to_owned(),
            reason: format!("reading its data failed: {error}"),
        })?;
        found += got as u64;
        if got < wanted {
            return Err(Error::Truncated { origin: origin.to_owned(), expected, found });
        }
        let chunk = &mut buffer[..got];
        if info.big_endian {
            chunk.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
        values.try_reserve(got / size).map_err(|_| Error::OutOfMemory {
            purpose: "an array of a file",
            bytes: info.n_elements().saturating_mul(size_of::<T>()),
        })?;
        convert(info.dtype, chunk, &mut values);
    }
    // The parts of a complex element are neighbours in either order.
    let parts_first = info.fortran_order && info.domain == Domain::Complex;
    let mut shape = info.shape.clone();
    shape.rotate_right(usize::from(parts_first));
    let shape = IxDyn(&shape).set_f(info.fortran_order);
    let mut array = ArrayD::from_shape_vec(shape, values).map_err(|error| Error::NpyHeader {
        origin: origin.to_owned(),
        reason: format!("shape {:?}: {error}", info.shape),
    })?;
    if parts_first {
        let rank = array.ndim();
        array = array.permuted_axes((1..rank).chain([0]).collect::<Vec<_>>());
    }
    Ok(if array.is_standard_layout() { array } else { array.as_standard_layout().into_owned() })
}

/// Fills the buffer unless the data ends first.
fn read_up_to(reader: &mut (impl Read + ?Sized), buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Appends little-endian elements.
fn convert<T: Real>(dtype: NumpyType, bytes: &[u8], out: &mut Vec<T>) {
    fn each<T, const N: usize>(bytes: &[u8], out: &mut Vec<T>, convert: impl Fn([u8; N]) -> T) {
        let (elements, _) = bytes.as_chunks::<N>();
        out.extend(elements.iter().map(|&element| convert(element)));
    }
    match dtype {
        NumpyType::F16 => each(bytes, out, |b| T::from_f32(f16::from_le_bytes(b).to_f32())),
        NumpyType::F32 => each(bytes, out, |b| T::from_f32(f32::from_le_bytes(b))),
        NumpyType::F64 => each(bytes, out, |b| T::from_f64(f64::from_le_bytes(b))),
        NumpyType::Bool => each(bytes, out, |[b]| T::from_u64(u64::from(b != 0))),
        NumpyType::I8 => each(bytes, out, |b| T::from_i64(i8::from_le_bytes(b).into())),
        NumpyType::I16 => each(bytes, out, |b| T::from_i64(i16::from_le_bytes(b).into())),
        NumpyType::I32 => each(bytes, out, |b| T::from_i64(i32::from_le_bytes(b).into())),
        NumpyType::I64 => each(bytes, out, |b| T::from_i64(i64::from_le_bytes(b))),
        NumpyType::U8 => each(bytes, out, |[b]| T::from_u64(b.into())),
        NumpyType::U16 => each(bytes, out, |b| T::from_u64(u16::from_le_bytes(b).into())),
        NumpyType::U32 => each(bytes, out, |b| T::from_u64(u32::from_le_bytes(b).into())),
        NumpyType::U64 => each(bytes, out, |b| T::from_u64(u64::from_le_bytes(b))),
    }
}
