//! Files that are either complete or not there.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// How the name of a temporary file ends; it begins with a dot.
const SUFFIX: &str = ".tmp";
/// Names that are tried for a temporary file.
const ATTEMPTS: u32 = 64;

/// Writes a file so that a reader, or a crash, sees either the old contents or the new ones.
///
/// `fill` writes to a temporary file in the same folder, which is forced to the disk and renamed. On
/// any error the temporary file is removed and `path` keeps what it had; one that a killed process
/// left behind is removed by the next write to the same path. A symbolic link stays one: the file it
/// points to is replaced. What is no file (a device, a pipe) is written to and never replaced.
///
/// # Errors
/// What `fill` returns, and what `refused` makes of a failure of the file system.
pub fn write_atomically<E>(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<(), E>,
    refused: impl Fn(io::Error) -> E,
) -> Result<(), E> {
    let target = match fs::metadata(path) {
        Ok(about) if about.is_dir() => return Err(refused(io::ErrorKind::IsADirectory.into())),
        Ok(about) if about.is_file() && path.is_symlink() => fs::canonicalize(path).map_err(&refused)?,
        Ok(about) if !about.is_file() => {
            let file = OpenOptions::new().write(true).open(path).map_err(&refused)?;
            let mut writer = BufWriter::new(file);
            fill(&mut writer)?;
            return writer.flush().map_err(refused);
        }
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(refused(err)),
        _ => path.to_owned(),
    };
    let folder = folder_of(&target);
    let (temporary, file) = Temporary::create(folder, &target).map_err(&refused)?;
    let mut writer = BufWriter::with_capacity(1 << 18, file);
    fill(&mut writer)?;
    let file = writer.into_inner().map_err(|err| refused(err.into_error()))?;
    file.sync_all().map_err(&refused)?;
    // The file stays open, and so locked, until it has its name.
    temporary.rename_to(&target).map_err(&refused)?;
    // The rename itself should reach the disk too. Not every system can synchronise a folder, and a
    // crash before it is there leaves the old file, so a failure here is no error.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// Removes temporary files that processes left in a folder when they were killed. Those of running
/// processes are locked, and stay.
pub fn remove_leftovers(folder: &Path) {
    remove_leftovers_of(folder, OsStr::new("."));
}

/// Whether a file name is that of a temporary file.
#[must_use]
pub fn is_temporary(name: &OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    bytes.starts_with(b".") && bytes.ends_with(SUFFIX.as_bytes())
}

/// As [`remove_leftovers`], where the name begins with `prefix`. What cannot be looked at stays.
fn remove_leftovers_of(folder: &Path, prefix: &OsStr) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if !is_temporary(&name) || !name.as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            continue;
        }
        let path = entry.path();
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        let file = is_file.then(|| OpenOptions::new().write(true).open(&path));
        if file.is_some_and(|file| file.is_ok_and(|file| file.try_lock().is_ok())) {
            let _ = fs::remove_file(&path);
        }
    }
}

/// The folder that a file is in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A file that is removed when it is dropped before it got its name.
struct Temporary(Option<PathBuf>);

impl Temporary {
    /// A new, locked file whose name holds the process and a counter, so that two writers never meet.
    fn create(folder: &Path, path: &Path) -> io::Result<(Self, File)> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let mut prefix = OsString::from(".");
        prefix.push(path.file_name().unwrap_or_default());
        prefix.push(".");
        remove_leftovers_of(folder, &prefix);
        for _ in 0..ATTEMPTS {
            let mut name = prefix.clone();
            name.push(format!("{}-{}{SUFFIX}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
            let temporary = folder.join(name);
            let file = match OpenOptions::new().write(true).create_new(true).open(&temporary) {
                // Of a machine that shares the folder, or of a process that died and cannot be told from it.
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => continue,
                file => file?,
            };
            // Another process may take the file for a leftover until it is locked. Where there are no
            // locks nobody removes leftovers.
            let taken = matches!(file.try_lock(), Err(TryLockError::WouldBlock)) || !temporary.exists();
            if !taken {
                return Ok((Temporary(Some(temporary)), file));
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("halfmode-atomic-file-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn write(path: &Path, text: &str) -> io::Result<()> {
        write_atomically(path, |file| file.write_all(text.as_bytes()), |err| err)
    }

    fn names(folder: &Path) -> Vec<OsString> {
        let mut names: Vec<OsString> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn leftovers_of_the_dead_go_and_those_of_the_living_stay() {
        let folder = folder("leftovers");
        for name in [".a.1-0.tmp", ".a.1-1.tmp", ".b.1-0.tmp", "a.tmp"] {
            fs::write(folder.join(name), "half of").unwrap();
        }
        let living = File::open(folder.join(".a.1-1.tmp")).unwrap();
        living.try_lock().unwrap();
        write(&folder.join("a"), "one").unwrap();
        assert_eq!(names(&folder), [".a.1-1.tmp", ".b.1-0.tmp", "a", "a.tmp"]);
        drop(living);
        remove_leftovers(&folder);
        assert_eq!(names(&folder), ["a", "a.tmp"]);
        fs::remove_dir_all(folder).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_devices_are_not_replaced() {
        use std::os::unix::fs::{FileTypeExt, symlink};
        let folder = folder("links");
        fs::create_dir_all(folder.join("far")).unwrap();
        fs::write(folder.join("far/file"), "old").unwrap();
        symlink("far/file", folder.join("link")).unwrap();
        symlink("loop", folder.join("loop")).unwrap();
        symlink("/dev/null", folder.join("null")).unwrap();
        write(&folder.join("link"), "new").unwrap();
        assert_eq!(fs::read(folder.join("far/file")).unwrap(), b"new");
        assert!(folder.join("link").is_symlink());
        assert!(write(&folder.join("loop"), "new").is_err());
        write(&folder.join("null"), "new").unwrap();
        assert!(fs::metadata(folder.join("null")).unwrap().file_type().is_char_device());
        if Path::new("/dev/full").exists() {
            symlink("/dev/full", folder.join("full")).unwrap();
            assert_eq!(write(&folder.join("full"), "new").unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
        assert_eq!(names(&folder.join("far")), ["file"]);
        fs::remove_dir_all(folder).unwrap();
    }
}
