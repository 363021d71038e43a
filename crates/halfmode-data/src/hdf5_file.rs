//! HDF5 files: those of h5py, MATLAB 7.3 and NetCDF-4, without the C library.

use halfmode_precision::Domain;
use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hdf5_reader::error::Error as ReaderError;
use hdf5_reader::group::Group;
use hdf5_reader::{Dataset, FileStorage, FilterRegistry, OpenOptions};
use ndarray::{ArrayD, IxDyn};

use crate::error::{Error, Result};
use crate::hdf5_type::{Numbers, numbers};
use crate::lzf;
use crate::npy_header::{ArrayInfo, NumpyType};
use crate::numpy::read_data;
use crate::real::Real;
use crate::regular_file::open_regular;

const SIGNATURE: &[u8; 8] = b"\x89HDF\r\n\x1a\n";
/// What the block before the HDF5 data says in files of `save -v7.3`.
const MATLAB: &[u8] = b"MATLAB 7.3 MAT-file";
/// Levels of groups that are looked at.
const MAX_DEPTH: usize = 64;
/// Groups and data sets that are looked at.
const MAX_ENTRIES: usize = 1 << 18;
/// Bytes of data that one byte of a file can stand for: deflate packs no tighter.
const MAX_EXPANSION: u64 = 1032;
/// Bytes of data that a file of any size may hold: fill values take no room in it.
const SMALL: u64 = 64 << 20;
/// The number under which h5py's LZF is registered.
const LZF_FILTER: u16 = 32000;

/// An open HDF5 file, its numeric data sets listed.
///
/// A data set in a group has the name `group/name`. Names are sorted, a group's data sets come before its
/// groups, and a group that links reach twice is listed once. Links to other files are not followed.
///
/// Complex numbers (`r`, `i` of h5py, `real`, `imag` of MATLAB) have a last axis of 2. Axes of MATLAB files are
/// reversed, as MATLAB stores them last to first: shapes are those that MATLAB shows. `scale_factor` and
/// `_FillValue` of NetCDF are not applied.
///
/// Headers are not trusted: a data set may take at most 1032 times the bytes of the file (deflate packs no
/// tighter) and 64 MiB.
pub struct Hdf5File {
    path: PathBuf,
    datasets: Vec<Entry>,
    left_out: Vec<LeftOut>,
    /// Whether axes stand last to first.
    reversed: bool,
}

struct Entry {
    name: String,
    dataset: Dataset,
    numbers: Numbers,
    shape: Vec<usize>,
}

/// A data set that is no array of numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Its name.
    pub name: String,
    /// What it holds instead.
    pub reason: String,
}

/// What a data set is, without its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hdf5Info {
    /// Type of the numbers; of each part if they are complex.
    pub dtype: NumpyType,
    /// Whether they are complex.
    pub complex: bool,
    /// Length of every axis; complex numbers have a last axis of 2.
    pub shape: Vec<usize>,
}

impl std::fmt::Debug for Hdf5File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hdf5File").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Hdf5File {
    /// Opens a file and lists its data sets; `None` if it is not HDF5.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Hdf5`], also if there is no numeric data set in it.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let io = |source| Error::Io { action: "open", path: path.to_owned(), source };
        let refuse = |reason: String| Error::Hdf5 { path: path.to_owned(), reason };
        let mut file = open_regular(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let (start, signed) = look(&mut file, length).map_err(io)?;
        let reversed = start == MATLAB;
        if !signed {
            let cut_off = || refuse("it ends before its HDF5 data".to_owned());
            return if reversed { Err(cut_off()) } else { Ok(None) };
        }
        let limit = usize::try_from(length.saturating_mul(MAX_EXPANSION).saturating_add(SMALL)).unwrap_or(usize::MAX);
        let options = OpenOptions::default()
            .with_chunk_cache_bytes(0)
            .with_filter_registry(filters(limit))
            .with_max_chunk_bytes(limit)
            .with_max_read_bytes(limit);
        let storage = FileStorage::from_file(file).map_err(|err| refuse(err.to_string()))?;
        let hdf5 = hdf5_reader::Hdf5File::from_storage_with_options(Arc::new(storage), options);
        let root = hdf5.and_then(|hdf5| hdf5.root_group()).map_err(|err| refuse(err.to_string()))?;
        let mut list = Hdf5File { path: path.to_owned(), datasets: Vec::new(), left_out: Vec::new(), reversed };
        list.collect(root).map_err(refuse)?;
        if list.datasets.is_empty() {
            let found = list.left_out.iter().take(8).map(|it| format!(": `{}` ({})", it.name, it.reason));
            return Err(refuse(format!("there is no numeric data set in it{}", found.collect::<String>())));
        }
        Ok(Some(list))
    }

    /// Lists what is in a group and in its groups.
    fn collect(&mut self, root: Group) -> Result<(), String> {
        let mut seen = HashSet::from([root.address()]);
        let mut groups = vec![(String::new(), 0, root)];
        let mut entries = 0;
        while let Some((prefix, depth, group)) = groups.pop() {
            let fail = |err: ReaderError| format!("group `/{prefix}`: {err}");
            let (mut inner, mut datasets) = group.member_names().map_err(fail)?;
            inner.sort_unstable();
            datasets.sort_unstable();
            entries += inner.len() + datasets.len();
            if entries > MAX_ENTRIES || depth > MAX_DEPTH {
                let limits = format!("{MAX_ENTRIES} groups and data sets, or {MAX_DEPTH} levels of them");
                return Err(format!("group `/{prefix}`: there are more than {limits}"));
            }
            for name in datasets {
                let dataset = group.dataset(&name);
                self.add(format!("{prefix}{name}"), dataset)?;
            }
            // The last one pushed is looked at first.
            for name in inner.into_iter().rev() {
                // MATLAB keeps the contents of cells and objects there.
                if self.reversed && name.starts_with('#') {
                    continue;
                }
                let group = group.group(&name).map_err(fail)?;
                if seen.insert(group.address()) {
                    groups.push((format!("{prefix}{name}/"), depth + 1, group));
                }
            }
        }
        Ok(())
    }

    /// Lists a data set. What the reader does not know is left out, what is damaged is an error.
    fn add(&mut self, name: String, dataset: Result<Dataset, ReaderError>) -> Result<(), String> {
        let dataset = match dataset {
            Ok(dataset) => dataset,
            Err(err) if is_unknown(&err) => {
                self.left_out.push(LeftOut { name, reason: err.to_string() });
                return Ok(());
            }
            Err(err) => return Err(format!("data set `{name}`: {err}")),
        };
        match numbers(&dataset) {
            Ok(numbers) => {
                let shape = dataset.shape().iter().map(|&n| usize::try_from(n).ok()).collect::<Option<Vec<usize>>>();
                // Empty axes do not excuse absurd ones: every partial product must be addressable.
                let bytes =
                    |shape: &Vec<usize>| shape.iter().try_fold(16usize, |bytes, &n| bytes.checked_mul(n.max(1)));
                let shape = shape.filter(|shape| bytes(shape).is_some_and(|bytes| isize::try_from(bytes).is_ok()));
                let too_large =
                    || format!("data set `{name}`: shape {:?} is too large for any memory", dataset.shape());
                let shape = shape.ok_or_else(too_large)?;
                self.datasets.push(Entry { name, dataset, numbers, shape });
            }
            Err(reason) => self.left_out.push(LeftOut { name, reason }),
        }
        Ok(())
    }

    /// Names of the numeric data sets.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        self.datasets.iter().map(|entry| entry.name.clone()).collect()
    }

    /// The other data sets.
    #[must_use]
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    fn find(&self, key: &str) -> Result<&Entry> {
        let missing = || Error::MissingKey { path: self.path.clone(), key: key.to_owned(), found: self.keys() };
        self.datasets.iter().find(|entry| entry.name == key).ok_or_else(missing)
    }

    /// Type and shape of one data set.
    ///
    /// # Errors
    /// [`Error::MissingKey`] with the names that exist.
    pub fn info(&self, key: &str) -> Result<Hdf5Info> {
        let Entry { numbers, shape, .. } = self.find(key)?;
        let mut shape = shape.clone();
        if self.reversed {
            shape.reverse();
        }
        shape.extend(numbers.complex.then_some(2));
        Ok(Hdf5Info { dtype: numbers.dtype, complex: numbers.complex, shape })
    }

    /// Reads one data set, row-major, as `f32` or `f64`. Conversions are those of
    /// [`read_npy`](crate::numpy::read_npy).
    ///
    /// # Shapes
    /// - returns the shape of [`Self::info`]
    ///
    /// # Errors
    /// [`Error::MissingKey`], [`Error::Hdf5`], [`Error::OutOfMemory`].
    pub fn read<T: Real>(&self, key: &str) -> Result<ArrayD<T>> {
        let Entry { dataset, numbers, shape, .. } = self.find(key)?;
        let refuse = |reason: String| Error::Hdf5 { path: self.path.clone(), reason };
        let bytes = dataset.read_raw_bytes().map_err(|err| refuse(format!("data set `{key}`: {err}")))?;
        let mut shape = shape.clone();
        shape.extend(numbers.complex.then_some(2));
        let info = ArrayInfo {
            shape,
            dtype: numbers.dtype,
            // The parts are an axis of the shape already.
            domain: Domain::Real,
            big_endian: numbers.big_endian,
            fortran_order: false,
            header_bytes: 0,
        };
        let array = read_data::<T>(&mut bytes.as_slice(), &info, &format!("`{}[{key}]`", self.path.display()))?;
        drop(bytes);
        if !self.reversed || array.ndim() < 2 {
            return Ok(array);
        }
        let n_axes = array.ndim() - usize::from(numbers.complex);
        let axes: Vec<usize> = (0..n_axes).rev().chain(n_axes..array.ndim()).collect();
        Ok(array.permuted_axes(IxDyn(&axes)).as_standard_layout().into_owned())
    }
}

/// The first bytes of a file, as many as [`MATLAB`] has, and whether it is HDF5: the signature stands at its start
/// or behind a block of 512, 1024, 2048, … bytes.
fn look(file: &mut File, length: u64) -> std::io::Result<(Vec<u8>, bool)> {
    let mut start = Vec::new();
    file.by_ref().take(MATLAB.len() as u64).read_to_end(&mut start)?;
    let mut at = 0;
    while at < length {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(at))?;
        file.by_ref().take(SIGNATURE.len() as u64).read_to_end(&mut bytes)?;
        if bytes == SIGNATURE {
            return Ok((start, true));
        }
        at = (2 * at).max(512);
    }
    Ok((start, false))
}

/// The reader's filters, and LZF.
fn filters(limit: usize) -> FilterRegistry {
    let mut registry = FilterRegistry::new();
    let unpack = move |bytes: &[u8]| {
        lzf::unpack(bytes, limit).ok_or_else(|| ReaderError::DecompressionError("this is no LZF stream".to_owned()))
    };
    registry.register(LZF_FILTER, Box::new(move |_, bytes, _| unpack(bytes)));
    registry
}

/// Whether an error is about what the reader does not know, rather than about damage.
fn is_unknown(err: &ReaderError) -> bool {
    match err {
        ReaderError::Context { source, .. } => is_unknown(source),
        ReaderError::UnsupportedDatatypeClass(_)
        | ReaderError::UnsupportedLayoutClass(_)
        | ReaderError::UnsupportedEncoding(_) => true,
        _ => false,
    }
}
