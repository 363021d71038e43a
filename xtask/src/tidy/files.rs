//! The text files of the repository: what git tracks or would track.

use std::path::Path;
use std::process::Command;

use crate::error::Error;

/// A text file.
pub(super) struct File {
    /// Relative to the root, with `/` between folders.
    pub(super) path: String,
    pub(super) text: String,
}

/// All text files that git tracks or that are new and not ignored; outside of a repository, all
/// but hidden folders and build outputs.
pub(super) fn list(root: &Path) -> Result<Vec<File>, Error> {
    let mut files = Vec::new();
    for path in git_paths(root).map_or_else(|| walk(root), Ok)? {
        let full = root.join(&path);
        // Git also lists files that were just deleted, and submodules.
        if !full.is_file() {
            continue;
        }
        let bytes = std::fs::read(&full).map_err(|source| Error::Read { path: full, source })?;
        if let Ok(text) = String::from_utf8(bytes) {
            files.push(File { path, text });
        }
    }
    Ok(files)
}

fn git_paths(root: &Path) -> Option<Vec<String>> {
    let arguments = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let output = Command::new("git").args(arguments).current_dir(root).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.split_terminator('\0').map(str::to_owned).collect())
}

fn walk(root: &Path) -> Result<Vec<String>, Error> {
    let (mut paths, mut folders) = (Vec::new(), vec![String::new()]);
    while let Some(folder) = folders.pop() {
        let full = root.join(&folder);
        let error = |source| Error::Read { path: full.clone(), source };
        for entry in std::fs::read_dir(&full).map_err(error)? {
            let entry = entry.map_err(error)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            let is_folder = entry.file_type().map_err(error)?.is_dir();
            if !is_folder {
                paths.push(path);
            } else if !matches!(name.as_str(), ".git" | "target" | "runs") {
                folders.push(path);
            }
        }
    }
    paths.sort();
    Ok(paths)
}
