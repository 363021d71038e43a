//! Files that are either complete or not there.

use crate::{Error, Result};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

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
/// They go to a temporary file in the same folder, which is forced to the disk and renamed; then
/// the folder is forced to the disk. On an error the temporary file is removed.
///
/// # Errors
/// Those of [`atomic_write`] and those of `fill`.
pub fn atomic_write_with(path: impl AsRef<Path>, fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let path = path.as_ref();
    let refused = |source| Error::write(path, source);
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let (temporary, file) = Temporary::create(folder, path)?;
    let mut writer = BufWriter::with_capacity(1 << 18, file);
    fill(&mut writer)?;
    let file = writer.into_inner().map_err(|err| refused(err.into_error()))?;
    file.sync_all().map_err(refused)?;
    drop(file);
    temporary.rename_to(path).map_err(refused)?;
    // Until the folder is on the disk too, a crash may bring the old name back.
    #[cfg(unix)]
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(refused)?;
    Ok(())
}

/// A file that is removed when it is dropped before it got its name.
struct Temporary(Option<PathBuf>);

impl Temporary {
    /// A new file whose name holds the process and a counter, so that two writers never meet.
    fn create(folder: &Path, path: &Path) -> Result<(Self, File)> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}-{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
        let temporary = folder.join(name);
        // A file of this name can only be left over from a process that died.
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&temporary);
        file.map(|file| (Temporary(Some(temporary)), file)).map_err(|source| Error::write(path, source))
    }

    fn rename_to(mut self, path: &Path) -> std::io::Result<()> {
        if let Some(temporary) = &self.0 {
            fs::rename(temporary, path)?;
        }
        self.0 = None;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Nothing can be done about a failure here, and an error is on its way already.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
