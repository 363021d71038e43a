//! Runs the program in a folder of its own.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use halfmode::train::read_named;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A folder of one test, removed when the test passes.
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
}

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder { path }
    }

    /// A job that takes a second in a debug build.
    pub(crate) fn tiny(name: &str) -> Self {
        let folder = Folder::new(name);
        folder.write("tiny.toml", TINY);
        folder
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path.join(name), text).unwrap();
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The program, in this folder, with a cache that all tests share.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_halfmode"));
        command.current_dir(&self.path).env("HALFMODE_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
        command.args(line.split_whitespace()).args(["--threads", "1"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, line: &str) -> Done {
        Done::of(line, self.command(line).output().unwrap())
    }

    /// The one JSON object that a command prints.
    pub(crate) fn json(&self, line: &str) -> Value {
        self.run(&format!("{line} --json")).ok().object()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// What a command left.
pub(crate) struct Done {
    pub(crate) line: String,
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    pub(crate) fn of(line: &str, output: Output) -> Self {
        let done = Done {
            line: line.to_owned(),
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(!done.stderr.contains("panicked"), "{line}: {}", done.stderr);
        done
    }

    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        self.exits(0)
    }

    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "halfmode {}\n{}{}", self.line, self.stdout, self.stderr);
        self
    }

    /// All of these are said on stderr.
    #[track_caller]
    pub(crate) fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.stderr.contains(word), "halfmode {}: no `{word}` in\n{}", self.line, self.stderr);
        }
        self
    }

    #[track_caller]
    pub(crate) fn object(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "halfmode {}: {}", self.line, self.stdout);
        serde_json::from_str(&self.stdout).unwrap()
    }
}

/// Refuses objects without one of these keys.
#[track_caller]
pub(crate) fn has_keys(object: &Value, keys: &[&str]) {
    for key in keys {
        assert!(object.get(key).is_some(), "no `{key}` in {object}");
    }
}

/// The tensors of a file, bit for bit.
pub(crate) fn tensors(path: &Path) -> Vec<(String, Vec<u64>)> {
    let (arrays, _) = read_named(path).unwrap();
    let bits = |values: Vec<f64>| values.into_iter().map(f64::to_bits).collect();
    arrays.into_iter().map(|(name, array)| (name, bits(array.to_f64()))).collect()
}

/// The tensors and the state of a run's newest checkpoint, without the time it took.
pub(crate) fn latest(run: &Path) -> (Vec<(String, Vec<u64>)>, Value) {
    let path = run.join("checkpoints/latest");
    let mut state = read_named(&path).unwrap().1["state"].clone();
    assert!(state.as_object_mut().unwrap().remove("seconds").is_some());
    (tensors(&path), state)
}

/// Two runs came to the same weights and state, bit for bit.
#[track_caller]
pub(crate) fn assert_same_run(a: &Path, b: &Path) {
    let (a, b) = (latest(a), latest(b));
    assert_eq!(a.1, b.1);
    let names = |it: &(Vec<(String, Vec<u64>)>, Value)| it.0.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b));
    for ((name, a), (_, b)) in a.0.iter().zip(&b.0) {
        assert!(a == b, "{name} differs");
    }
}

pub(crate) const TINY: &str = r#"seed = 3

[data]
kind = "darcy"
n_train = 8
n_test = 2
resolution = 16
test_resolutions = [16, 20]

[model]
kind = "fno"
n_modes = [4, 4]
hidden_channels = 4
n_layers = 2
stabilizer = "tanh"

[train]
epochs = 2
batch_size = 2
loss = "h1"

[optimizer]
learning_rate = 5e-3
"#;
