//! Files that are either complete or not there.

use std::fs::{self, File, OpenOptions};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Writes a file so that a reader, or a crash, never sees half of it.
///
/// `write` fills a temporary file in the same folder. The file is then synchronised with the disk
/// and renamed over `path`. On any error the temporary file is removed and `path` keeps what it
/// had.
///
/// # Errors
/// [`Error::Io`] with the failing step, or what `write` returns.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let io = |action: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    };
    let (file, temporary) = create_temporary(path)?;
    let cleanup = Cleanup(Some(&temporary));
    let mut writer = BufWriter::with_capacity(1 << 18, file);
    write(&mut writer)?;
    let file = writer.into_inner().map_err(|error| io("write", &temporary)(error.into_error()))?;
    file.sync_all().map_err(io("synchronise", &temporary))?;
    drop(file);
    fs::rename(&temporary, path).map_err(io("write", path))?;
    cleanup.disarm();
    // The rename itself must reach the disk too. Not every system can synchronise a folder, and
    // the file is complete without it, so a failure here is no error.
    if let Ok(folder) = File::open(folder_of(path)) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// Removes the temporary file when an error, or a panic in `write`, leaves early.
struct Cleanup<'a>(Option<&'a Path>);

impl Cleanup<'_> {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A new file beside `path`. Its name holds the process and a counter, so that writers of the
/// same path do not meet.
fn create_temporary(path: &Path) -> Result<(File, PathBuf)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}-{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    let temporary = folder_of(path).join(name);
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&temporary)
        .map(|file| (file, temporary))
        .map_err(|source| Error::Io { action: "write", path: path.to_owned(), source })
}
