//! A folder of programs for a machine with a GPU and without cargo.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

use crate::error::Error;
use crate::metadata;

/// Tests that need a GPU: package, test target, and the feature that brings the GPU in, if the package has it.
const TESTS: &[(&str, &str, Option<&str>)] = &[
    ("halfmode-cuda", "device", None),
    ("halfmode-tensor", "cuda", Some("cuda")),
    ("halfmode-nn", "spectral_conv", Some("cuda")),
    ("halfmode-nn", "fno_block", Some("cuda")),
    ("halfmode-nn", "pointwise_mlp", Some("cuda")),
    ("halfmode-nn", "pointwise", Some("cuda")),
    ("halfmode-nn", "resize", Some("cuda")),
    ("halfmode-nn", "complex", Some("cuda")),
    ("halfmode-operators", "golden", Some("cuda")),
    ("halfmode-nn", "tf32", Some("cuda")),
    ("halfmode-nn", "tanh_mlp", Some("cuda")),
    ("halfmode-nn", "refusals", Some("cuda")),
    ("halfmode-ode", "gpu", Some("cuda")),
    ("halfmode-ode", "conv_gpu", Some("cuda")),
    ("halfmode-nn", "conv2d", Some("cuda")),
    ("halfmode-nn", "symmetric_conv", Some("cuda")),
    ("halfmode-train", "cross_entropy", Some("cuda")),
    ("halfmode-train", "cuda", Some("cuda")),
    ("halfmode-train", "cuda_losses", Some("cuda")),
    ("halfmode-train", "cuda_job", Some("cuda")),
    ("halfmode-train", "cuda_graph", Some("cuda")),
    ("halfmode-train", "recorded_step", Some("cuda")),
];
const BENCHES: [&str; 4] = ["step", "transform", "gpu_step", "gpu_ode"];

/// Ignored by git.
const FOLDER: &str = "gpu-bundle";
/// What the folder may take, to be carried over a slow line: packed, it is two fifths of that.
const MAX_BYTES: u64 = 160 << 20;
const RUN: &str = include_str!("gpu_bundle_run.sh");

/// A part of the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// With debug assertions: memory that a kernel promised to write begins as NaN.
    Tests,
    Cli,
    Benches,
}

const PARTS: [(&str, Part); 3] = [("tests", Part::Tests), ("cli", Part::Cli), ("benches", Part::Benches)];

/// A program that cargo built.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    /// Folder of its package.
    package: PathBuf,
    target: String,
    file: PathBuf,
}

/// Builds the folder below `root`, or with `--only PART` that part of it.
pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<(), Error> {
    let folder = root.join(FOLDER);
    for part in chosen(arguments)? {
        let name = PARTS.iter().find(|it| it.1 == part).map_or("", |it| it.0);
        replace(&folder.join(name), &programs(root, part)?)?;
    }
    let script = folder.join("run.sh");
    std::fs::write(&script, RUN).map_err(|source| Error::Write { path: script.clone(), source })?;
    executable(&script)?;
    let mut bytes = 0;
    for file in files(&folder)? {
        let size = std::fs::metadata(&file).map_err(|source| Error::Read { path: file.clone(), source })?.len();
        bytes += size;
        println!("{:>7.1} MiB  {}", mib(size), file.strip_prefix(root).unwrap_or(&file).display());
    }
    println!("{:>7.1} MiB  in all; on the machine with the GPU: {FOLDER}/run.sh", mib(bytes));
    if bytes > MAX_BYTES {
        return Err(Error::TooLarge { what: FOLDER, mib: mib(bytes), most: mib(MAX_BYTES) });
    }
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn chosen(arguments: &[String]) -> Result<Vec<Part>, Error> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [] => Ok(PARTS.iter().map(|it| it.1).collect()),
        ["--only", name] => match PARTS.iter().find(|it| it.0 == name) {
            Some((_, part)) => Ok(vec![*part]),
            None => Err(Error::Usage { problem: format!("`{name}` is none of tests, cli, benches") }),
        },
        _ => Err(Error::Usage { problem: "`gpu-bundle` takes `--only tests|cli|benches`".to_owned() }),
    }
}

/// The programs of a part with their names in the folder.
fn programs(root: &Path, part: Part) -> Result<Vec<(String, PathBuf)>, Error> {
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|it| (*it).to_owned()));
    match part {
        Part::Tests => {
            add(&["test", "--no-run", "--release", "--config", "profile.release.debug-assertions=true"]);
            for (package, target, feature) in TESTS {
                add(&["-p", package, "--test", target]);
                if let Some(feature) = feature {
                    add(&["--features", &format!("{package}/{feature}")]);
                }
            }
        }
        Part::Cli => add(&["build", "--release", "-p", "halfmode", "--bin", "halfmode", "--features", "cuda"]),
        Part::Benches => {
            add(&["bench", "--no-run", "--profile", "release", "-p", "halfmode-benches", "--features", "cuda"]);
            BENCHES.iter().for_each(|it| add(&["--bench", it]));
        }
    }
    add(&["--config", "profile.release.strip=true", "--message-format=json-render-diagnostics"]);
    let built = build(root, &arguments)?;
    let find = |folder: Option<&Path>, target: &str| {
        let found = built.iter().find(|it| it.target == target && folder.is_none_or(|folder| it.package == folder));
        let problem = || format!("no executable of target {target}");
        found.map(|it| it.file.clone()).ok_or_else(|| Error::Output { program: "cargo", problem: problem() })
    };
    match part {
        Part::Cli => Ok(vec![("halfmode".to_owned(), find(None, "halfmode")?)]),
        Part::Benches => BENCHES.iter().map(|it| Ok(((*it).to_owned(), find(None, it)?))).collect(),
        Part::Tests => {
            let packages = metadata::load(root)?;
            let folder = |name: &str| packages.iter().find(|it| it.name == name).map(|it| it.folder.as_path());
            let test = |&(package, target, _): &(&str, &str, _)| {
                let problem = || format!("no package {package}");
                let folder =
                    folder(package).ok_or_else(|| Error::Output { program: "cargo metadata", problem: problem() })?;
                Ok((format!("{package}-{target}"), find(Some(folder), target)?))
            };
            TESTS.iter().map(test).collect()
        }
    }
}

/// Runs cargo and returns the programs that it says it built.
fn build(root: &Path, arguments: &[String]) -> Result<Vec<Program>, Error> {
    println!("gpu-bundle: cargo {}", arguments.join(" "));
    let mut cargo = crate::cargo_command(root);
    let output = cargo.args(arguments).stderr(Stdio::inherit()).output();
    let output = output.map_err(|source| Error::Start { program: crate::cargo(), source })?;
    if !output.status.success() {
        return Err(Error::Failed { what: format!("cargo {}", arguments.first().map_or("", String::as_str)) });
    }
    Ok(executables(&String::from_utf8_lossy(&output.stdout)))
}

/// The executables among cargo's messages, one object per line.
fn executables(messages: &str) -> Vec<Program> {
    let program = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        Some(Program {
            file: message["executable"].as_str()?.into(),
            package: Path::new(message["manifest_path"].as_str()?).parent()?.to_path_buf(),
            target: message["target"]["name"].as_str()?.to_owned(),
        })
    };
    messages.lines().filter_map(program).collect()
}

/// Makes `folder` hold copies of the programs and nothing else.
fn replace(folder: &Path, programs: &[(String, PathBuf)]) -> Result<(), Error> {
    let error = |source| Error::Write { path: folder.to_path_buf(), source };
    if folder.exists() {
        std::fs::remove_dir_all(folder).map_err(error)?;
    }
    std::fs::create_dir_all(folder).map_err(error)?;
    for (name, file) in programs {
        std::fs::copy(file, folder.join(name)).map_err(error)?;
    }
    Ok(())
}

/// All files below `folder`, by name.
fn files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        let error = |source| Error::Read { path: folder.clone(), source };
        for entry in std::fs::read_dir(&folder).map_err(error)? {
            let path = entry.map_err(error)?.path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(unix)]
fn executable(script: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    let permissions = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(script, permissions).map_err(|source| Error::Write { path: script.into(), source })
}

#[cfg(not(unix))]
fn executable(_script: &Path) -> Result<(), Error> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_among_cargos_messages() {
        let messages = r#"{"reason":"compiler-artifact","manifest_path":"/x/a/Cargo.toml","target":{"name":"a"},"executable":null}
{"reason":"compiler-artifact","manifest_path":"/x/a/Cargo.toml","target":{"name":"device"},"executable":"/t/device-1"}
noise
{"reason":"build-finished","success":true}"#;
        let program = Program { package: "/x/a".into(), target: "device".into(), file: "/t/device-1".into() };
        assert_eq!(executables(messages), [program]);
    }

    /// A test that asks for a GPU and is not in the list would never meet one.
    #[test]
    fn every_test_that_asks_for_a_gpu_is_carried() {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
        let mut asking = 0;
        for folder in std::fs::read_dir(crates).unwrap() {
            let folder = folder.unwrap().path();
            let Ok(tests) = std::fs::read_dir(folder.join("tests")) else { continue };
            for file in tests {
                let file = file.unwrap().path();
                let Ok(text) = std::fs::read_to_string(&file) else { continue };
                if !text.contains("gpu()") || !text.contains("halfmode_testkit") {
                    continue;
                }
                asking += 1;
                let [package, target] = [folder.file_name(), file.file_stem()].map(|it| it.unwrap().to_str().unwrap());
                assert!(TESTS.iter().any(|it| (it.0, it.1) == (package, target)), "{}", file.display());
            }
        }
        assert!(asking > 10, "{asking}");
    }

    #[test]
    fn parts_are_named() {
        let chosen = |words: &[&str]| chosen(&words.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>());
        assert_eq!(chosen(&[]).unwrap(), [Part::Tests, Part::Cli, Part::Benches]);
        assert_eq!(chosen(&["--only", "cli"]).unwrap(), [Part::Cli]);
        for bad in [&["--only"][..], &["--only", "docs"], &["cli"]] {
            assert!(matches!(chosen(bad), Err(Error::Usage { .. })), "{bad:?}");
        }
    }
}
