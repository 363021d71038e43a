//! The directory of a run: one process at a time writes it, and a run that died can be taken up again.

use crate::job::model_file::read_model_file;
use crate::job::{JobError, ModelConfig, TrainState, Trainer};
use halfmode_data::{is_temporary, remove_leftovers};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// Whether nothing but leftovers of killed processes is in a directory, or it does not exist.
#[must_use]
pub fn is_unused(out: &Path) -> bool {
    let mut entries = std::fs::read_dir(out).into_iter().flatten().flatten();
    entries.all(|entry| is_temporary(&entry.file_name()))
}

/// Creates the directory with its folders, and locks it until the result is dropped or the process
/// ends, however it ends. `None` where the system cannot lock a directory.
pub(crate) fn take(out: &Path) -> Result<Option<File>, JobError> {
    let refused = |path: &Path, err| JobError::Train(crate::Error::write(path, err));
    std::fs::create_dir_all(out).map_err(|err| refused(out, err))?;
    let lock = match File::open(out) {
        Ok(folder) => match folder.try_lock() {
            Ok(()) => Some(folder),
            Err(TryLockError::WouldBlock) => return Err(JobError::OutInUse { path: out.to_owned() }),
            Err(TryLockError::Error(_)) => None,
        },
        Err(_) => None,
    };
    let folders = ["checkpoints", "plots"].map(|name| out.join(name));
    for folder in &folders {
        std::fs::create_dir_all(folder).map_err(|err| refused(folder, err))?;
    }
    [out, &folders[0], &folders[1]].into_iter().for_each(remove_leftovers);
    Ok(lock)
}

/// The checkpoint that a run goes on from: `latest`, else the newest step; `None` if nothing was saved.
#[must_use]
pub fn newest_checkpoint(out: &Path) -> Option<PathBuf> {
    let folder = out.join("checkpoints");
    let latest = folder.join("latest");
    if latest.symlink_metadata().is_ok() { Some(latest) } else { step_files(&folder).pop() }
}

/// Restores a checkpoint.
///
/// # Errors
/// [`JobError::Resume`] with the newest other checkpoint that can be used.
pub(crate) fn restore(trainer: &mut Trainer, out: &Path, path: &Path) -> Result<TrainState, JobError> {
    let restored = read_state(path, &trainer.config().model).and_then(|(arrays, state, normalisers)| {
        trainer.restore(&arrays, state.clone(), normalisers)?;
        Ok(state)
    });
    restored.map_err(|err| {
        let why = match err {
            JobError::ModelFile { why, .. } => why,
            other => other.to_string(),
        };
        let mut others = step_files(&out.join("checkpoints"));
        others.retain(|other| other != path);
        let model = &trainer.config().model;
        let older = others.into_iter().rev().find(|other| read_state(other, model).is_ok());
        JobError::Resume { path: path.to_owned(), why, older }
    })
}

type Restored = (std::collections::BTreeMap<String, crate::Array>, TrainState, crate::job::Normalisers);

/// What a checkpoint of a model holds.
fn read_state(path: &Path, model: &ModelConfig) -> Result<Restored, JobError> {
    let bad = |why: &str| JobError::ModelFile { path: path.to_owned(), why: why.to_owned() };
    let (arrays, metadata) = read_model_file(path)?;
    let state = metadata.state.ok_or_else(|| bad("it holds a model but no training state"))?;
    let normalisers = metadata.normalisers.ok_or_else(|| bad("it holds no normalisers"))?;
    if metadata.config != *model {
        return Err(bad("it was written for another model than the configuration describes"));
    }
    if !state.is_sound() {
        return Err(bad("its training state has counts that no run reaches"));
    }
    Ok((arrays, state, normalisers))
}

/// The step checkpoints of a folder, oldest first.
pub(crate) fn step_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_step = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with("step-") && name.ends_with(".safetensors"))
    };
    let mut files: Vec<PathBuf> = entries.filter(is_step).collect();
    files.sort();
    files
}

/// Makes a forced run start over: old checkpoints must not be resumed by mistake.
pub(crate) fn remove_checkpoints(out: &Path) -> Result<(), JobError> {
    let folder = out.join("checkpoints");
    // `latest` first: without it, and with some steps, a run can still be taken up.
    let mut old = vec![folder.join("latest"), folder.join("best")];
    old.extend(step_files(&folder));
    for path in old {
        match std::fs::remove_file(&path) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                return Err(crate::Error::write(&path, err).into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Makes `to` another name of `from`, atomically; a copy where the file system has no links.
pub(crate) fn link(from: &Path, to: &Path) -> Result<(), JobError> {
    let temporary = to.with_file_name(".latest.tmp");
    let failed = |err| crate::Error::write(to, err);
    match std::fs::remove_file(&temporary) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => return Err(failed(err).into()),
        _ => {}
    }
    if std::fs::hard_link(from, &temporary).is_err() {
        std::fs::copy(from, &temporary).map_err(failed)?;
    }
    Ok(std::fs::rename(&temporary, to).map_err(failed)?)
}
