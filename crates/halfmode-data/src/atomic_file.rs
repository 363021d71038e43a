//! Files that are either complete or not there.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes a file so that a reader, or a crash, sees either the old contents or the new ones.
///
/// `fill` writes to a temporary file in the same folder, which is forced to the disk and renamed. On
/// any error the temporary file is removed and `path` keeps what it had.
///
/// # Errors
/// What `fill` returns, and what `refused` makes of a failure of the file system.
pub fn write_atomically<E>(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<(), E>,
    refused: impl Fn(io::Error) -> E,
) -> Result<(), E> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let (temporary, file) = Temporary::create(folder, path).map_err(&refused)?;
    let mut writer = BufWriter::with_capacity(1 << 18, file);
    fill(&mut writer)?;
    let file = writer.into_inner().map_err(|err| refused(err.into_error()))?;
    file.sync_all().map_err(&refused)?;
    drop(file);
    temporary.rename_to(path).map_err(&refused)?;
    // The rename itself should reach the disk too. Not every system can synchronise a folder, and a
    // crash before it is there leaves the old file, so a failure here is no error.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// A file that is removed when it is dropped before it got its name.
struct Temporary(Option<PathBuf>);

impl Temporary {
    /// A new file whose name holds the process and a counter, so that two writers never meet.
    fn create(folder: &Path, path: &Path) -> io::Result<(Self, File)> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}-{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
        let temporary = folder.join(name);
        // A file of this name can only be left over from a process that died.
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&temporary)?;
        Ok((Temporary(Some(temporary)), file))
    }

    fn rename_to(mut self, path: &Path) -> io::Result<()> {
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
