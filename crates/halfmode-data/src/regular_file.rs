//! Files to read from: regular ones, and nothing that may never answer.

use std::fs::File;
use std::io;
use std::path::Path;

/// Opens a regular file. Pipes, devices and folders are refused: opening a pipe waits for a writer that
/// may never come, and a device may never end.
///
/// # Errors
/// What the file system says; [`io::ErrorKind::IsADirectory`] and [`io::ErrorKind::InvalidInput`] for what
/// is no file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let about = std::fs::metadata(path)?;
    if about.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !about.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a pipe or a device, not a file"));
    }
    File::open(path)
}
