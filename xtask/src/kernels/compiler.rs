//! The run-time compiler: an installed one, or NVIDIA's Python wheels.

use std::path::Path;
use std::process::Command;

use halfmode_cuda::{Roots, compiler_version};

use crate::error::Error;

/// Where the wheels are unpacked, below the root of the workspace.
const WHEELS_FOLDER: &str = "target/cuda-wheels";
/// The compiler and the headers that kernels include. Registers depend on the compiler, so it is one version.
const WHEELS: [&str; 4] = [
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
];

/// A compiler that is there.
pub(super) struct Compiler {
    pub(super) roots: Roots,
    /// Major and minor version.
    pub(super) version: (i32, i32),
}

/// The compiler that the environment names; if there is none, the one that pip can fetch.
pub(super) fn find_or_fetch(root: &Path) -> Result<Compiler, Error> {
    if let Ok(compiler) = open(Roots::from_environment()) {
        return Ok(compiler);
    }
    let folder = root.join(WHEELS_FOLDER);
    let wheels = || Roots::new(vec![folder.join("nvidia/cu13")]);
    if let Ok(compiler) = open(wheels()) {
        return Ok(compiler);
    }
    fetch(&folder)?;
    open(wheels()).map_err(|err| Error::Compiler { problem: err.to_string() })
}

fn open(roots: Roots) -> halfmode_cuda::Result<Compiler> {
    roots.include()?;
    let version = compiler_version(&roots)?;
    Ok(Compiler { roots, version })
}

fn fetch(folder: &Path) -> Result<(), Error> {
    println!("kernels: fetching the compiler into {WHEELS_FOLDER}");
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"])
        .args(["--upgrade", "--target"])
        .arg(folder)
        .args(WHEELS)
        .env("PIP_ROOT_USER_ACTION", "ignore");
    let problem = match pip.status() {
        Err(err) => format!("python3 cannot be started ({err})"),
        Ok(status) if !status.success() => format!("python3 -m pip install {} failed", WHEELS.join(" ")),
        Ok(_) => return Ok(()),
    };
    Err(Error::Compiler { problem })
}
