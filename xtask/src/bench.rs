//! The workspace's benches, with their results saved or compared.

use std::path::Path;
use std::process::Command;

use crate::error::Error;

/// Runs the benches of `halfmode-benches` with `arguments`: a filter, `--save FILE`,
/// `--against FILE`; with `--device cuda` the bench of a GPU, and what that takes.
pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<(), Error> {
    let here = std::env::current_dir().map_err(|source| Error::Read { path: ".".into(), source })?;
    let (device, arguments) = device(arguments)?;
    let arguments = absolute_files(&arguments, &here)?;
    let cargo = crate::cargo();
    let which: &[&str] = match device {
        // Bench targets only: the test harness of the library would not know our options.
        Device::Cpu => &["--bench", "*"],
        Device::Cuda => &["--features", "cuda", "--bench", "gpu_step", "--bench", "gpu_ode"],
    };
    let status = Command::new(&cargo)
        .args(["bench", "--package", "halfmode-benches"])
        .args(which)
        .arg("--")
        .args(arguments)
        .current_dir(root)
        .status()
        .map_err(|source| Error::Start { program: cargo, source })?;
    if status.success() { Ok(()) } else { Err(Error::Failed { what: "cargo bench".to_owned() }) }
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    Cpu,
    Cuda,
}

/// What `--device` says, and the other arguments.
fn device(arguments: &[String]) -> Result<(Device, Vec<String>), Error> {
    let (mut device, mut others) = (Device::Cpu, Vec::new());
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let name = match argument.split_once('=') {
            Some(("--device", name)) => Some(name),
            _ if argument == "--device" => Some(rest.next().map_or("", String::as_str)),
            _ => None,
        };
        match name {
            None => others.push(argument.clone()),
            Some("cpu") => device = Device::Cpu,
            Some("cuda") => device = Device::Cuda,
            Some(name) => return Err(Error::Usage { problem: format!("`--device {name}` is neither cpu nor cuda") }),
        }
    }
    Ok((device, others))
}

/// The arguments with files named from the root of the file system: cargo runs a bench in the
/// folder of its package.
fn absolute_files(arguments: &[String], here: &Path) -> Result<Vec<String>, Error> {
    let absolute = |file: &str| here.join(file).to_string_lossy().into_owned();
    let mut result = Vec::with_capacity(arguments.len());
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.split_once('=') {
            Some((option @ ("--save" | "--against"), file)) => result.extend([option.to_owned(), absolute(file)]),
            _ if matches!(argument.as_str(), "--save" | "--against") => {
                let Some(file) = rest.next().filter(|it| !it.starts_with("--")) else {
                    return Err(Error::Usage { problem: format!("`{argument}` needs a file") });
                };
                result.extend([argument.clone(), absolute(file)]);
            }
            _ => result.push(argument.clone()),
        }
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn absolute(arguments: &[&str]) -> Result<Vec<String>, Error> {
        let arguments: Vec<String> = arguments.iter().map(|it| (*it).to_owned()).collect();
        absolute_files(&arguments, Path::new("/here"))
    }

    #[test]
    fn files_are_made_absolute_and_the_rest_is_passed_on() {
        let got = absolute(&["rfft", "--save", "a.csv", "--against=/b.csv", "--quick"]).unwrap();
        assert_eq!(got, ["rfft", "--save", "/here/a.csv", "--against", "/b.csv", "--quick"]);
    }

    #[test]
    fn the_device_is_taken_out() {
        let of = |words: &[&str]| device(&words.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&["darcy"]).unwrap(), (Device::Cpu, vec!["darcy".to_owned()]));
        assert_eq!(of(&["--device", "cuda", "darcy"]).unwrap(), (Device::Cuda, vec!["darcy".to_owned()]));
        assert_eq!(of(&["--device=cuda"]).unwrap(), (Device::Cuda, vec![]));
        assert!(matches!(of(&["--device", "tpu"]), Err(Error::Usage { .. })));
        assert!(matches!(of(&["--device"]), Err(Error::Usage { .. })));
    }

    #[test]
    fn an_option_without_its_file_is_refused() {
        assert!(matches!(absolute(&["--save"]), Err(Error::Usage { .. })));
        assert!(matches!(absolute(&["--save", "--against", "b"]), Err(Error::Usage { .. })));
    }
}
