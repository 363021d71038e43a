//! Generated data on disk, so that it is generated once.
//!
//! A file's name holds the SHA-256 of generator, version and configuration. The file is an `.npz`
//! with `x`, `y` and `meta`; `meta` is JSON with the same key and the SHA-256 of the contents,
//! which is verified on every load. A file that does not verify is generated again.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use ndarray::{ArrayD, ArrayView1};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::dataset::FieldPairs;
use crate::error::{Error, Result};
use crate::npz::NpzFile;
use crate::numpy::{NpzArray, write_npz};

/// A deterministic source of data. The value itself is the configuration.
pub trait Generator: Serialize {
    /// Name, part of the cache key and the file name: lower-case letters, digits and dashes.
    const NAME: &'static str;
    /// Raised with every change of the data that the same configuration gives.
    const VERSION: u32;

    /// Generates the data. Arguments as in [`generate`](crate::generate).
    ///
    /// # Errors
    /// What the generator says.
    fn generate(&self, threads: Option<NonZeroUsize>, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<FieldPairs>;
}

/// What the cache did.
#[derive(Debug)]
#[non_exhaustive]
pub enum CacheOutcome {
    /// The data came from a verified file.
    Loaded {
        /// The file.
        path: PathBuf,
    },
    /// The data was generated and stored.
    Stored {
        /// The file.
        path: PathBuf,
        /// Why a file that was there could not be used.
        replaced: Option<CacheWarning>,
    },
    /// The data was generated, but could not be stored.
    NotStored {
        /// The file that should have been written.
        path: PathBuf,
        /// Why a file that was there could not be used.
        replaced: Option<CacheWarning>,
        /// Why nothing was stored.
        why: Box<Error>,
    },
}

/// Why a file in the cache folder was not used.
#[derive(Debug)]
#[non_exhaustive]
pub enum CacheWarning {
    /// It could not be read.
    Unreadable(Box<Error>),
    /// It is not a cache file, or one of another generator, version or configuration.
    Foreign,
    /// Its contents do not have the hash that it states.
    Corrupt,
}

impl fmt::Display for CacheWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(error) => write!(f, "it could not be read: {error}"),
            Self::Foreign => f.write_str("it was not written for this configuration"),
            Self::Corrupt => f.write_str("its contents do not match their checksum"),
        }
    }
}

impl CacheOutcome {
    /// The cache file, whether or not it exists now.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Loaded { path } | Self::Stored { path, .. } | Self::NotStored { path, .. } => path,
        }
    }

    /// A sentence for the user if something was not as it should be.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let (path, replaced) = match self {
            Self::Loaded { .. } => return None,
            Self::Stored { path, replaced } => (path, replaced),
            Self::NotStored { path, replaced, .. } => (path, replaced),
        };
        let mut text = String::new();
        if let Some(reason) = replaced {
            text = format!("ignored the cached data in `{}`: {reason}", path.display());
        }
        if let Self::NotStored { why, .. } = self {
            let separator = if text.is_empty() { "" } else { "; " };
            text.push_str(&format!("{separator}the data was not cached: {why}"));
        }
        Some(text).filter(|text| !text.is_empty())
    }
}

/// What a cache file says about itself.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Meta {
    generator: String,
    version: u32,
    config: String,
    content_sha256: String,
}

/// Layout of cache files; part of the key.
const FORMAT: u32 = 1;

/// Loads the data of `generator` from `folder`, or generates and stores it.
///
/// The folder is created if needed. A folder that cannot be written is no error: the outcome says
/// that nothing was stored. Two processes may do this at once; both get the same data.
///
/// # Errors
/// Only what the generator itself returns, and [`Error::Json`] if it has no JSON form.
pub fn load_or_generate<G: Generator>(
    generator: &G,
    folder: &Path,
    threads: Option<NonZeroUsize>,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(FieldPairs, CacheOutcome)> {
    let config = config_json(generator)?;
    let path = folder.join(file_name::<G>(&config));
    let replaced = match load::<G>(&path, &config) {
        Ok(Some(pairs)) => return Ok((pairs, CacheOutcome::Loaded { path })),
        Ok(None) => None,
        Err(warning) => Some(warning),
    };
    let pairs = generator.generate(threads, progress)?;
    let outcome = match store::<G>(&path, folder, config, &pairs) {
        Ok(()) => CacheOutcome::Stored { path, replaced },
        Err(why) => CacheOutcome::NotStored { path, replaced, why: Box::new(why) },
    };
    Ok((pairs, outcome))
}

/// The file in `folder` that holds, or would hold, the data of `generator`.
///
/// # Errors
/// [`Error::Json`] if the generator has no JSON form.
pub fn cache_path<G: Generator>(generator: &G, folder: &Path) -> Result<PathBuf> {
    Ok(folder.join(file_name::<G>(&config_json(generator)?)))
}

fn config_json<G: Generator>(generator: &G) -> Result<String> {
    serde_json::to_string(generator).map_err(|source| Error::Json { purpose: "a generator's configuration", source })
}

fn file_name<G: Generator>(config: &str) -> String {
    let mut hash = Sha256::new();
    for part in ["halfmode cache", &FORMAT.to_string(), G::NAME, &G::VERSION.to_string(), config] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    format!("{}-{}.npz", G::NAME, &hex(&hash.finalize())[..24])
}

/// `None`: there is no file.
fn load<G: Generator>(path: &Path, config: &str) -> Result<Option<FieldPairs>, CacheWarning> {
    let unreadable = |error| CacheWarning::Unreadable(Box::new(error));
    let mut file = match NpzFile::open(path) {
        Ok(file) => file,
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(unreadable(error)),
    };
    let meta = match file.read::<f32>("meta") {
        Ok(meta) => meta,
        Err(Error::MissingKey { .. }) => return Err(CacheWarning::Foreign),
        Err(error) => return Err(unreadable(error)),
    };
    // Bytes pass through f32 unchanged.
    let meta: Vec<u8> = meta.iter().map(|&byte| byte as u8).collect();
    let meta: Meta = serde_json::from_slice(&meta).map_err(|_| CacheWarning::Foreign)?;
    if meta.generator != G::NAME || meta.version != G::VERSION || meta.config != config {
        return Err(CacheWarning::Foreign);
    }
    let x = file.read::<f32>("x").map_err(unreadable)?;
    let y = file.read::<f32>("y").map_err(unreadable)?;
    if content_hash(&x, &y) != meta.content_sha256 {
        return Err(CacheWarning::Corrupt);
    }
    FieldPairs::new(x, y).map(Some).map_err(unreadable)
}

fn store<G: Generator>(path: &Path, folder: &Path, config: String, pairs: &FieldPairs) -> Result<()> {
    let meta = Meta {
        generator: G::NAME.to_owned(),
        version: G::VERSION,
        config,
        content_sha256: content_hash(pairs.x(), pairs.y()),
    };
    let meta = serde_json::to_vec(&meta)
        .map_err(|source| Error::Json { purpose: "the description of cached data", source })?;
    std::fs::create_dir_all(folder).map_err(|source| Error::Io {
        action: "create",
        path: folder.to_owned(),
        source,
    })?;
    write_npz(
        path,
        &[
            ("x", NpzArray::F32(pairs.x().view())),
            ("y", NpzArray::F32(pairs.y().view())),
            ("meta", NpzArray::U8(ArrayView1::from(&meta).into_dyn())),
        ],
    )
}

/// SHA-256 over ranks, shapes and little-endian values of both arrays.
fn content_hash(x: &ArrayD<f32>, y: &ArrayD<f32>) -> String {
    let mut hash = Sha256::new();
    let mut bytes = Vec::with_capacity(1 << 16);
    for array in [x, y] {
        hash.update((array.ndim() as u64).to_le_bytes());
        for &n in array.shape() {
            hash.update((n as u64).to_le_bytes());
        }
        let mut values = array.iter();
        loop {
            bytes.clear();
            bytes.extend(values.by_ref().take(1 << 14).flat_map(|v| v.to_le_bytes()));
            if bytes.is_empty() {
                break;
            }
            hash.update(&bytes);
        }
    }
    hex(&hash.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
