//! Every kernel file of the workspace, compiled for every architecture it names, on a machine without a GPU.
//!
//! What the compiler says of each kernel is compared with a committed table: registers that grow or values that
//! spill are seen in a review, not in a profile.

mod compiler;
mod header;
mod resources;
mod table;

pub(crate) use header::Header;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use halfmode_cuda::Roots;

use crate::error::Error;
use table::Row;

/// The table of the last blessing.
const SNAPSHOT: &str = "docs/kernels.txt";

/// What to do with a table that differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Snapshot {
    Check,
    Bless,
}

/// One call of the compiler.
struct Job {
    /// Crate and name of the file, such as `halfmode-tensor/pointwise`.
    file: String,
    text: String,
    arch: String,
    defines: Vec<String>,
}

/// Compiles all kernel files below `root`, prints the table and compares it with the committed one.
pub(crate) fn run(root: &Path, snapshot: Snapshot) -> Result<(), Error> {
    let jobs = jobs(root)?;
    let compiler = compiler::find_or_fetch(root)?;
    let mut rows = compile_all(&jobs, &compiler.roots)?;
    rows.sort();
    let found = table::render(compiler.version, &rows);
    print!("{found}");
    let path = root.join(SNAPSHOT);
    if snapshot == Snapshot::Bless {
        std::fs::write(&path, found).map_err(|source| Error::Write { path, source })?;
        println!("kernels: wrote {SNAPSHOT}");
        return Ok(());
    }
    let committed = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(source) => return Err(Error::Read { path, source }),
    };
    let differences = table::differences(&committed, &found);
    if differences.is_empty() {
        println!("kernels: {} compilations, {} kernels, as in {SNAPSHOT}", jobs.len(), rows.len());
        return Ok(());
    }
    println!("\nkernels: differences from {SNAPSHOT}");
    differences.iter().for_each(|it| println!("{it}"));
    Err(Error::Differences { count: differences.len(), path: SNAPSHOT, bless: "cargo xtask kernels --bless" })
}

fn jobs(root: &Path) -> Result<Vec<Job>, Error> {
    let mut jobs = Vec::new();
    for path in kernel_files(root)? {
        let text = std::fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let header = Header::parse(&text)
            .map_err(|it| Error::Kernel { path: path.clone(), problem: format!("line {}: {}", it.line, it.problem) })?;
        let name = |it: Option<&Path>, part: fn(&Path) -> Option<&std::ffi::OsStr>| {
            it.and_then(part).unwrap_or_default().to_string_lossy().into_owned()
        };
        let crate_folder = path.parent().and_then(Path::parent);
        let file = format!("{}/{}", name(crate_folder, Path::file_name), name(Some(&path), Path::file_stem));
        for arch in &header.archs {
            for defines in &header.variants {
                let (file, text) = (file.clone(), text.clone());
                jobs.push(Job { file, text, arch: arch.clone(), defines: defines.clone() });
            }
        }
    }
    Ok(jobs)
}

/// `crates/*/kernels/*.cu`.
fn kernel_files(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = |folder: PathBuf| -> Result<Vec<PathBuf>, Error> {
        let error = |source| Error::Read { path: folder.clone(), source };
        let entries: Result<Vec<_>, _> = std::fs::read_dir(&folder).map_err(error)?.collect();
        Ok(entries.map_err(error)?.into_iter().map(|it| it.path()).collect())
    };
    let mut files = Vec::new();
    for crate_folder in entries(root.join("crates"))? {
        let folder = crate_folder.join("kernels");
        if folder.is_dir() {
            files.extend(entries(folder)?.into_iter().filter(|it| it.extension().is_some_and(|it| it == "cu")));
        }
    }
    files.sort();
    Ok(files)
}

/// Runs all jobs on all cores and prints what does not compile.
fn compile_all(jobs: &[Job], roots: &Roots) -> Result<Vec<Row>, Error> {
    let next = AtomicUsize::new(0);
    let (rows, problems) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let work = || {
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            match compile(job, roots) {
                Ok(found) => locked(&rows).extend(found),
                Err(problem) => locked(&problems).push(problem),
            }
        }
    };
    std::thread::scope(|scope| {
        let n_workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        (0..n_workers).for_each(|_| drop(scope.spawn(work)));
    });
    let mut problems = std::mem::take(&mut *locked(&problems));
    problems.sort();
    problems.iter().for_each(|it| eprintln!("{it}\n"));
    match problems.len() {
        0 => Ok(std::mem::take(&mut *locked(&rows))),
        count => Err(Error::Failed { what: format!("compiling kernels: {count} of {} compilations", jobs.len()) }),
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn compile(job: &Job, roots: &Roots) -> Result<Vec<Row>, String> {
    let Job { file, text, arch, defines } = job;
    let variant = if defines.is_empty() { "-".to_owned() } else { defines.join(",") };
    let place = format!("{file} {variant}");
    let compiled = halfmode_cuda::compile((file, text), arch, defines, roots, None);
    let log = compiled.map_err(|err| format!("{place}: {err}"))?.log;
    let kernels = resources::parse(&log).map_err(|it| format!("{place} for {arch}: {it}"))?;
    let row = |(kernel, resources)| Row {
        file: file.clone(),
        kernel,
        variant: variant.clone(),
        arch: arch.clone(),
        resources,
    };
    Ok(kernels.into_iter().map(row).collect())
}
