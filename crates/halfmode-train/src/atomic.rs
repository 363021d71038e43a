//! Files of a run that are either complete or not there.

use crate::{Error, Result};
use halfmode_data::write_atomically;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Writes a file so that a reader, or a crash, sees either the old contents or the new ones.
///
/// # Errors
/// [`Error::DiskFull`], [`Error::NotWritable`] or [`Error::Io`]; `path` then keeps what it had.
pub fn atomic_write(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    atomic_write_with(path, |file| file.write_all(bytes).map_err(|source| Error::write(path, source)))
}

/// As [`atomic_write`], with contents that `fill` writes bit by bit.
///
/// # Errors
/// Those of [`atomic_write`] and those of `fill`.
pub fn atomic_write_with(path: impl AsRef<Path>, fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let path = path.as_ref();
    write_atomically(path, fill, |source| Error::write(path, source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;
    use std::fs;
    use std::path::PathBuf;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("halfmode-atomic-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn names(folder: &Path) -> Vec<OsString> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn replaces_and_leaves_nothing_else() {
        let folder = folder("replace");
        let path = folder.join("summary.json");
        atomic_write(&path, b"one").unwrap();
        atomic_write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(&folder), ["summary.json"]);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_failure_keeps_the_old_file() {
        let folder = folder("failure");
        let path = folder.join("latest");
        atomic_write(&path, b"old").unwrap();
        let result = atomic_write_with(&path, |file| {
            file.write_all(b"half of").unwrap();
            Err(Error::NoMetric)
        });
        assert!(matches!(result, Err(Error::NoMetric)));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(&folder), ["latest"]);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_missing_folder_and_a_folder_as_target_are_errors() {
        let folder = folder("missing");
        assert!(matches!(atomic_write(folder.join("no/such/file"), b""), Err(Error::Io { .. })));
        assert!(atomic_write(&folder, b"").is_err());
        assert!(atomic_write("/", b"").is_err());
        assert!(names(&folder).is_empty());
        fs::remove_dir_all(folder).unwrap();
    }
}
