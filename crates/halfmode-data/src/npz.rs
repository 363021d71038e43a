//! `.npz` archives: several named arrays in one zip file.
//!
//! Arrays are written by `ndarray-npy`. Reading goes to the zip layer directly, because
//! `ndarray-npy` cannot say an array's type before it reads it, has no half precision, and
//! parses headers recursively (see `npy_header.rs`).

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use ndarray::ArrayD;
use zip::ZipArchive;
use zip::result::ZipError;

use crate::error::{Error, Result};
use crate::npy_header::{ArrayInfo, read_header};
use crate::numpy::read_data;
use crate::real::Real;
use crate::regular_file::open_regular;

/// An open `.npz` archive, stored or deflated (`np.savez`, `np.savez_compressed`).
pub struct NpzFile<R> {
    archive: ZipArchive<R>,
    path: PathBuf,
}

impl<R> std::fmt::Debug for NpzFile<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NpzFile").field("path", &self.path).finish_non_exhaustive()
    }
}

impl NpzFile<BufReader<File>> {
    /// Opens an archive and reads its list of arrays.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Archive`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path).map_err(|source| Error::Io { action: "open", path: path.to_owned(), source })?;
        Self::from_reader(BufReader::new(file), path)
    }
}

impl<R: Read + Seek> NpzFile<R> {
    /// Reads an archive from anywhere; `name` stands for it in messages.
    ///
    /// # Errors
    /// [`Error::Archive`].
    pub fn from_reader(reader: R, name: &Path) -> Result<Self> {
        let archive = ZipArchive::new(reader)
            .map_err(|error| Error::Archive { path: name.to_owned(), reason: error.to_string() })?;
        Ok(Self { archive, path: name.to_owned() })
    }

    /// Names of the arrays, in the archive's order.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        self.archive.file_names().map(|name| name.strip_suffix(".npy").unwrap_or(name).to_owned()).collect()
    }

    /// Type and shape of one array.
    ///
    /// # Errors
    /// [`Error::MissingKey`] with the names that exist, [`Error::Archive`],
    /// [`Error::NpyHeader`], [`Error::UnsupportedType`].
    pub fn info(&mut self, key: &str) -> Result<ArrayInfo> {
        self.with_entry(key, |reader, origin| read_header(reader, origin))
    }

    /// Reads one array, as `f32` or `f64`. Conversions are those of
    /// [`read_npy`](crate::numpy::read_npy).
    ///
    /// # Errors
    /// As [`Self::info`], and [`Error::Truncated`].
    pub fn read<T: Real>(&mut self, key: &str) -> Result<ArrayD<T>> {
        self.with_entry(key, |reader, origin| {
            let info = read_header(reader, origin)?;
            let array = read_data(reader, &info, origin)?;
            // Reading to the end makes the zip layer compare its checksum.
            std::io::copy(&mut reader.take(1 << 16), &mut std::io::sink())
                .map_err(|error| Error::NpyHeader { origin: origin.to_owned(), reason: error.to_string() })?;
            Ok(array)
        })
    }

    fn with_entry<O>(&mut self, key: &str, read: impl FnOnce(&mut dyn Read, &str) -> Result<O>) -> Result<O> {
        let origin = format!("`{}[{key}]`", self.path.display());
        let name =
            [format!("{key}.npy"), key.to_owned()].into_iter().find(|name| self.archive.index_for_name(name).is_some());
        let Some(name) = name else {
            return Err(Error::MissingKey { path: self.path.clone(), key: key.to_owned(), found: self.keys() });
        };
        let mut entry = self.archive.by_name(&name).map_err(|error: ZipError| Error::Archive {
            path: self.path.clone(),
            reason: format!("entry `{name}`: {error}"),
        })?;
        read(&mut entry, &origin)
    }
}
