//! From what users type to a [`JobConfig`], and from an error back to the line that caused it.

use crate::cli::error::{CliError, Exit, config_key, job_exit};
use crate::cli::text::nearest;
use halfmode::data::DarcyPt;
use halfmode::precision::{PrecisionPolicy, Preset};
use halfmode::train::job::{DataConfig, DataShapes, JobConfig, JobError, data_shapes};
use halfmode::train::task::{self, TaskConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::Read;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

/// The operator on fields that is known by name.
const DARCY: &str = "darcy";

/// Jobs that are known by name.
fn presets() -> impl Iterator<Item = &'static str> {
    std::iter::once(DARCY).chain(task::PRESETS)
}

/// The longest configuration that is read.
const MAX_BYTES: u64 = 1 << 16;

/// What configures a job: shared by `train`, `plan` and `bench`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ConfigArgs {
    /// A TOML file, a run directory, or the name of a preset (darcy, cnf, latent-spiral, ode-classifier).
    #[arg(value_name = "CONFIG|PRESET")]
    pub(crate) config: String,
    /// Replaces one value, such as train.epochs=5 or 'scheduler={kind="cosine",t_max=15}'.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) sets: Vec<String>,
}

/// A configuration, of an operator on fields or of a task, and where it came from.
#[derive(Clone, Debug)]
pub(crate) struct Loaded<C = JobConfig> {
    pub(crate) config: C,
    /// The preset's name, the file's stem or the run directory's name.
    pub(crate) name: String,
    /// The run directory, if that was named.
    pub(crate) run_dir: Option<PathBuf>,
    /// The command that helps where data are wrong, if data are read.
    data_command: Option<String>,
    origin: Origin,
}

/// What a configuration is of.
#[derive(Clone, Debug)]
pub(crate) enum Job {
    /// An operator on fields.
    Fields(Box<Loaded>),
    /// A task.
    Task(Box<Loaded<TaskConfig>>),
}

/// Where the text came from, for error messages.
#[derive(Clone, Debug)]
struct Origin {
    /// What the user typed.
    argument: String,
    /// The file; presets have none.
    file: Option<PathBuf>,
    text: String,
    /// Paths of `--set` and `--seed`, with what was typed.
    sets: Vec<(Vec<String>, String)>,
}

impl Loaded {
    /// Checks all values.
    pub(crate) fn validate(&self) -> Result<PrecisionPolicy, CliError> {
        self.config.validate().map_err(|err| self.explain(err))
    }

    /// Shapes of all samples, from the configuration or the headers of files.
    pub(crate) fn shapes(&self) -> Result<DataShapes, CliError> {
        data_shapes(&self.config).map_err(|err| self.explain_data(err))
    }

    /// An error of reading or making data, with a command that helps.
    pub(crate) fn explain_data(&self, err: JobError) -> CliError {
        self.explain(err).or_help(self.data_help())
    }

    /// The command that looks at the data, or makes some.
    fn data_help(&self) -> String {
        match &self.config.data {
            DataConfig::Darcy(_) => "halfmode train darcy".to_owned(),
            DataConfig::Burgers(_) | DataConfig::NavierStokes(_) => format!("halfmode plan {}", self.origin.argument),
            DataConfig::DarcyPt(darcy) => {
                let files = darcy.test_resolutions.iter().map(|&n| darcy.test_file(n));
                let files: Vec<DarcyPt> = std::iter::once(darcy.train_file()).chain(files).collect();
                match files.iter().find(|file| !file.path().exists()) {
                    Some(_) => format!("halfmode plan {} --set data.folder=FOLDER", self.origin.argument),
                    None => format!("halfmode data inspect {}", darcy.train_file().path().display()),
                }
            }
            DataConfig::File(file) => {
                let missing = std::iter::once(&file.train).chain(&file.test).find(|path| !path.exists());
                match missing {
                    Some(path) => {
                        format!("halfmode data generate darcy --n 100 --resolution 64 --output {}", path.display())
                    }
                    None => format!("halfmode data inspect {}", file.train.display()),
                }
            }
        }
    }
}

impl<C> Loaded<C> {
    /// What the user typed.
    pub(crate) fn argument(&self) -> &str {
        &self.origin.argument
    }

    /// The error with the place in the configuration that caused it.
    pub(crate) fn explain(&self, err: JobError) -> CliError {
        let key = config_key(&err).filter(|_| job_exit(&err) == Exit::Config);
        let Some(key) = key else {
            let help = self.data_command.clone().filter(|_| job_exit(&err) == Exit::Data);
            let err = CliError::from(err);
            return help.map_or_else(|| err.clone(), |help| err.clone().or_help(help));
        };
        let path: Vec<String> = key.split('.').map(str::to_owned).collect();
        let what = match &err {
            JobError::Config { why, .. } => format!("{key}: {why}"),
            other => other.to_string(),
        };
        CliError::new(Exit::Config, what).at(self.origin.place(&path)).help(self.origin.check())
    }
}

/// The text behind an argument, with a name and the run directory if that was named.
fn open(argument: &str) -> Result<(String, Option<PathBuf>, Origin), CliError> {
    let path = Path::new(argument);
    let stem =
        |path: &Path| path.file_stem().map_or_else(|| "run".to_owned(), |stem| stem.to_string_lossy().into_owned());
    let preset = match argument {
        DARCY => Some(toml::to_string(&JobConfig::darcy())),
        name => TaskConfig::preset(name).map(|config| toml::to_string(&config)),
    };
    let (name, file, run_dir, text) = if let Some(text) = preset {
        let text = text.map_err(|err| CliError::new(Exit::Other, err.to_string()))?;
        (argument.to_owned(), None, None, text)
    } else if path.is_dir() {
        let file = path.join("config.toml");
        let text = read(&file, argument)?;
        let name = path.canonicalize().map_or_else(|_| stem(path), |path| stem(&path));
        (name, Some(file), Some(path.to_owned()), text)
    } else {
        (stem(path), Some(path.to_owned()), None, read(path, argument)?)
    };
    Ok((name, run_dir, Origin { argument: argument.to_owned(), file, text, sets: Vec::new() }))
}

/// Reads a preset, a file or a run directory's `config.toml`, once, and applies `--set` and `--seed`.
pub(crate) fn load(args: &ConfigArgs, seed: Option<u64>) -> Result<Job, CliError> {
    let (name, run_dir, mut origin) = open(&args.config)?;
    let mut table = origin.parse()?;
    for set in &args.sets {
        let path = overlay(&mut table, set)?;
        origin.sets.push((path, format!("--set {set}")));
    }
    if let Some(seed) = seed {
        table.insert("seed".to_owned(), Value::Integer(seed as i64));
        origin.sets.push((vec!["seed".to_owned()], format!("--seed {seed}")));
    }
    spread_preset(&mut table);
    if task::is_task(&table) {
        let config = origin.config(&table)?;
        return Ok(Job::Task(Box::new(Loaded { config, name, run_dir, data_command: None, origin })));
    }
    let config = origin.config(&table)?;
    let loaded = Loaded { config, name, run_dir, data_command: None, origin };
    let data_command = Some(loaded.data_help());
    Ok(Job::Fields(Box::new(Loaded { data_command, ..loaded })))
}

/// The text of a configuration.
pub(crate) fn read(path: &Path, argument: &str) -> Result<String, CliError> {
    let refuse = |err: std::io::Error| {
        let missing = err.kind() == std::io::ErrorKind::NotFound;
        let what = if missing { "no such configuration" } else { "the configuration cannot be read" };
        let why = match nearest(argument, presets()) {
            Some(preset) if missing => format!("it is neither a file nor a preset; the nearest preset is `{preset}`"),
            _ if missing => format!("it is neither a file nor a preset ({})", presets().collect::<Vec<_>>().join(", ")),
            _ => err.to_string(),
        };
        CliError::new(Exit::Config, what).at(path.display().to_string()).why(why).help("halfmode train darcy")
    };
    read_text(path).map_err(refuse)
}

/// A text of at most 64 KiB, from whatever gives bytes: pipes are welcome here.
pub(crate) fn read_text(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let n_bytes = std::fs::File::open(path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if n_bytes as u64 > MAX_BYTES {
        let why = "it is longer than 64 KiB, and so probably not a configuration";
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, why));
    }
    Ok(text)
}

/// A table of formats as `precision.preset` is what departs from `full`.
fn spread_preset(table: &mut Table) {
    let Some(Value::Table(precision)) = table.get_mut("precision") else { return };
    let full = Value::String(Preset::Full.to_string());
    match precision.insert("preset".to_owned(), full) {
        Some(Value::Table(formats)) => precision.extend(formats),
        Some(name) => _ = precision.insert("preset".to_owned(), name),
        None => _ = precision.remove("preset"),
    }
}

/// Puts `KEY=VALUE` into the table and returns the key's path.
fn overlay(table: &mut Table, set: &str) -> Result<Vec<String>, CliError> {
    let refuse = |why: String| {
        let err = CliError::new(Exit::Config, "this --set cannot be used").at(format!("--set {set}")).why(why);
        err.help("halfmode plan darcy --set train.batch_size=16")
    };
    let Some((key, value)) = set.split_once('=') else {
        return Err(refuse("it needs the form KEY=VALUE".to_owned()));
    };
    let path = key_path(key).ok_or_else(|| refuse(format!("`{key}` is not a key, such as train.batch_size")))?;
    let Some((last, tables)) = path.split_last() else {
        return Err(refuse("it has no key".to_owned()));
    };
    let mut target = table;
    for (depth, name) in tables.iter().enumerate() {
        let next = target.entry(name.clone()).or_insert_with(|| Value::Table(Table::new()));
        target = match next {
            Value::Table(table) => table,
            _ => return Err(refuse(format!("`{}` is a value, not a table", path[..=depth].join(".")))),
        };
    }
    target.insert(last.clone(), parse_value(value.trim()));
    Ok(path)
}

/// The parts of a dotted key, quoted ones included.
fn key_path(key: &str) -> Option<Vec<String>> {
    let mut value = Value::Table(toml::from_str::<Table>(&format!("{key} = 0")).ok()?);
    let mut path = Vec::new();
    loop {
        match value {
            Value::Table(table) => {
                let mut entries = table.into_iter();
                let (name, inner) = entries.next()?;
                if entries.next().is_some() {
                    return None;
                }
                path.push(name);
                value = inner;
            }
            Value::Integer(0) => return Some(path),
            _ => return None,
        }
    }
}

/// A TOML value; what is none is a string.
fn parse_value(text: &str) -> Value {
    let parsed = toml::from_str::<Table>(&format!("value = {text}")).ok();
    let parsed = parsed.filter(|table| table.len() == 1).and_then(|mut table| table.remove("value"));
    parsed.unwrap_or_else(|| Value::String(text.to_owned()))
}

impl Origin {
    fn parse(&self) -> Result<Table, CliError> {
        toml::from_str::<Table>(&self.text).map_err(|err| {
            let line = err.span().map(|span| self.line(span.start));
            let message = err.message().split_whitespace().collect::<Vec<_>>().join(" ");
            let place = match line {
                Some(line) => format!("{}:{line}", self.file_name()),
                None => self.file_name(),
            };
            CliError::new(Exit::Config, "the configuration is not TOML")
                .at(place)
                .why(message)
                .help("halfmode train darcy")
        })
    }

    fn file_name(&self) -> String {
        self.file.as_ref().map_or_else(|| format!("preset {}", self.argument), |file| file.display().to_string())
    }

    fn line(&self, offset: usize) -> usize {
        self.text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
    }

    /// `file:line: key`, or the `--set` that wrote the key.
    fn place(&self, path: &[String]) -> String {
        let key = path.join(".");
        let set = self.sets.iter().rev().find(|(set, _)| path.starts_with(set) || set.starts_with(path));
        if let Some((_, typed)) = set {
            return format!("{typed}: {key}");
        }
        let line = self.file.as_ref().and_then(|_| self.line_of(path));
        match line {
            Some(line) => format!("{}:{line}: {key}", self.file_name()),
            None => format!("{}: {key}", self.file_name()),
        }
    }

    /// The line of a key, or of the table that should hold it.
    fn line_of(&self, path: &[String]) -> Option<usize> {
        let root = DeTable::parse(&self.text).ok()?;
        let mut table = root.get_ref();
        let mut offset = None;
        for name in path {
            let Some((key, value)) = table.iter().find(|(key, _)| key.get_ref().as_ref() == name.as_str()) else {
                break;
            };
            offset = Some(key.span().start);
            match value.get_ref() {
                DeValue::Table(inner) => table = inner,
                _ => break,
            }
        }
        offset.map(|offset| self.line(offset))
    }

    /// The command that shows whether the configuration is in order.
    fn check(&self) -> String {
        format!("halfmode plan {}", self.argument)
    }

    /// The configuration in a table.
    fn config<C: DeserializeOwned>(&self, table: &Table) -> Result<C, CliError> {
        table.clone().try_into::<C>().map_err(|err| self.refuse::<C>(table, err.message()))
    }

    /// The error of a table that is no configuration.
    fn refuse<C: DeserializeOwned>(&self, table: &Table, message: &str) -> CliError {
        let message = message.lines().next().unwrap_or("it is no configuration");
        let path = blame::<C>(table, message);
        let place = if path.is_empty() { self.file_name() } else { self.place(&path) };
        let err = CliError::new(Exit::Config, "").at(place).help(self.check());
        let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
        let kind = [("unknown field", "key"), ("unknown variant", "value")];
        let kind = kind.into_iter().find(|(start, _)| message.starts_with(start));
        match (kind, quoted.split_first()) {
            (Some((_, kind)), Some((word, known))) => {
                let what = format!("unknown {kind} `{word}`");
                let list = known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
                let why = if let Some(near) = nearest(word, known.iter().copied()) {
                    format!("the nearest known {kind} is `{near}`; known are {list}")
                } else if known.is_empty() {
                    format!("no {kind} may stand here")
                } else {
                    format!("known are {list}")
                };
                err.named(what).why(why)
            }
            _ => match message.strip_prefix("missing field ") {
                Some(field) => err.named(format!("the key {field} is missing")),
                None => err.named(message.to_owned()),
            },
        }
    }
}

/// The path of the value that causes `message`: the one without which the error is another. Works
/// through tagged and untagged enums, which forget where their parts came from.
fn blame<C: DeserializeOwned>(root: &Table, message: &str) -> Vec<String> {
    let first_line = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    let changes = |path: &[String]| {
        let mut without = root.clone();
        remove(&mut without, path);
        without.try_into::<C>().map_or_else(|err| first_line(err.message()) != message, |_| true)
    };
    let missing = message.starts_with("missing field");
    let mut path: Vec<String> = Vec::new();
    while let Some(table) = descend(root, &path) {
        // Without its `kind` every table is wrong in another way, so that one comes last.
        let (kinds, others): (Vec<_>, Vec<_>) = table.iter().partition(|(name, _)| *name == "kind");
        let candidates = others.into_iter().chain(kinds).filter(|(_, value)| !missing || value.is_table());
        let mut candidates = candidates.map(|(name, _)| name);
        let guilty = candidates.find_map(|name| {
            let candidate = [&path[..], std::slice::from_ref(name)].concat();
            changes(&candidate).then_some(candidate)
        });
        match guilty {
            Some(guilty) => path = guilty,
            None => break,
        }
    }
    path
}

fn descend<'a>(root: &'a Table, path: &[String]) -> Option<&'a Table> {
    path.iter().try_fold(root, |table, name| table.get(name)?.as_table())
}

fn remove(root: &mut Table, path: &[String]) {
    if let [name] = path {
        root.remove(name);
    } else if let [name, rest @ ..] = path
        && let Some(Value::Table(inner)) = root.get_mut(name)
    {
        remove(inner, rest);
    }
}

/// Keys whose values differ, with the old and the new value.
pub(crate) fn differences<C: Serialize>(old: &C, new: &C) -> Vec<String> {
    fn flatten(prefix: &str, table: Table, into: &mut std::collections::BTreeMap<String, String>) {
        for (name, value) in table {
            let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            match value {
                Value::Table(inner) => flatten(&key, inner, into),
                other => drop(into.insert(key, other.to_string())),
            }
        }
    }
    let flat = |config: &C| {
        let mut keys = std::collections::BTreeMap::new();
        flatten("", Table::try_from(config).unwrap_or_default(), &mut keys);
        keys
    };
    let (old, new) = (flat(old), flat(new));
    let absent = "(default)".to_owned();
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let changed = keys.into_iter().filter(|&key| old.get(key) != new.get(key));
    changed
        .map(|key| format!("{key}: {} -> {}", old.get(key).unwrap_or(&absent), new.get(key).unwrap_or(&absent)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::Index;

    fn args(config: &str, sets: &[&str]) -> ConfigArgs {
        ConfigArgs { config: config.to_owned(), sets: sets.iter().map(|&set| set.to_owned()).collect() }
    }

    fn load(args: &ConfigArgs, seed: Option<u64>) -> Result<Loaded, CliError> {
        super::load(args, seed).map(|job| match job {
            Job::Fields(loaded) => *loaded,
            Job::Task(loaded) => panic!("a task: {loaded:?}"),
        })
    }

    fn refused(sets: &[&str]) -> String {
        load(&args("darcy", sets), None).expect_err("should be refused").render(false)
    }

    #[test]
    fn values_are_toml_or_strings() {
        let loaded =
            load(&args("darcy", &["train.epochs=3", "precision.preset=full", "model.n_modes=[8, 8]"]), Some(7));
        let config = loaded.expect("is legal").config;
        assert_eq!((config.train.epochs, config.seed), (3, 7));
        assert_eq!(config.precision.preset, halfmode::precision::Preset::Full);
        assert_eq!(config.model.fno().n_modes, [8, 8]);
        let quoted = load(&args("darcy", &["precision.saved_overrides.\"linear.x\"=f32"]), None).expect("is legal");
        assert_eq!(quoted.config.precision.saved_overrides.len(), 1);
    }

    #[test]
    fn a_preset_may_be_a_table_of_formats() {
        let set = "precision.preset={pointwise={storage=\"bf16\",accumulate=\"f32\"}, saved=\"bf16\"}";
        let loaded = load(&args("darcy", &[set]), None).expect("is legal");
        let policy = loaded.validate().expect("is legal");
        let formats = [policy.pointwise.storage, policy.saved, policy.transform.storage].map(|it| it.to_string());
        assert_eq!((policy.preset, formats.join(" ")), (Preset::Full, "bf16 bf16 f32".to_owned()));
        let text = refused(&["precision.preset={transfrom=\"f16\"}"]);
        assert!(text.contains("unknown key `transfrom`") && text.contains("`transform`"), "{text}");
    }

    #[test]
    fn tables_are_replaced_whole() {
        let config = load(&args("darcy", &["scheduler={kind=\"cosine\", t_max=4}"]), None).expect("is legal").config;
        assert!(matches!(config.scheduler, halfmode::train::Schedule::Cosine { t_max: 4, .. }));
    }

    #[test]
    fn the_guilty_key_is_found_through_tagged_enums() {
        for (set, words) in [
            ("model.n_mode=[4,4]", ["unknown key `n_mode`", "nearest known key is `n_modes`", "model.n_mode"]),
            ("data.n_trian=4", ["unknown key `n_trian`", "`n_train`", "data.n_trian"]),
            ("data.kind=dracy", ["unknown value `dracy`", "`darcy`", "data.kind"]),
            ("model.n_modes=x", ["invalid type", "--set model.n_modes=x", "model.n_modes"]),
            ("train.epochs=-1", ["epochs", "-1", "train.epochs"]),
            ("scheduler={kind=\"step\",step_size=1,gama=2}", ["unknown key `gama`", "`gamma`", "scheduler.gama"]),
            ("trian.epochs=1", ["unknown key `trian`", "`train`", "trian"]),
        ] {
            let text = refused(&[set]);
            assert!(words.iter().all(|word| text.contains(word)), "{set}: {text}");
        }
    }

    #[test]
    fn what_is_no_assignment_is_refused() {
        for set in ["train.epochs", "=3", "a b=3", "train.epochs.x=3", "seed = 1\nx=2", ""] {
            assert!(refused(&[set]).contains("--set"), "{set}");
        }
    }

    #[test]
    fn differences_name_keys() {
        let old = JobConfig::darcy();
        let mut new = old.clone();
        new.train.epochs = 30;
        assert_eq!(differences(&old, &new), ["train.epochs: 18 -> 30"]);
    }

    const TINY: &str = r#"seed = 3

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
stabilizer = "tanh"

[precision]
preset = "mixed"
transform = { storage = "f16", accumulate = "f32" }

[train]
epochs = 2
loss = "h1"

[scheduler]
kind = "step"
step_size = 5
"#;

    /// A legal configuration, or an error that says something and names a command.
    fn try_text(text: &[u8], sets: &[&str]) -> bool {
        use std::sync::atomic::{AtomicU64, Ordering};
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = format!("halfmode-config-{}-{}.toml", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).unwrap();
        let loaded = load(&args(&path.display().to_string(), sets), None);
        std::fs::remove_file(&path).unwrap();
        let checked = loaded.and_then(|loaded| loaded.validate().and_then(|_| loaded.shapes()));
        let told = |err: &CliError| !err.what().is_empty() && err.to_json()["help"].is_string();
        assert!(checked.as_ref().err().is_none_or(told), "{checked:?}");
        checked.is_ok()
    }

    #[test]
    fn the_text_that_is_changed_is_legal() {
        assert!(try_text(TINY.as_bytes(), &[]));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn changed_text_is_refused_or_used(
            changes in prop::collection::vec((any::<Index>(), 0usize..4, "[-=\\[\\]{}\"'.,#a-z0-9_ \n\\\\é]{0,4}"), 1..5),
        ) {
            let mut text = TINY.as_bytes().to_vec();
            for (at, n_removed, by) in changes {
                let at = at.index(text.len());
                let end = (at + n_removed).min(text.len());
                text.splice(at..end, by.into_bytes());
            }
            try_text(&text, &[]);
        }

        #[test]
        fn any_bytes_are_refused_or_used(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            try_text(&bytes, &[]);
        }

        #[test]
        fn any_set_is_refused_or_used(
            table in prop::sample::select(&["data", "model", "precision", "train", "optimizer", "scheduler", "seed", ""][..]),
            key in prop::sample::select(&["kind", "n_modes", "n_layers", "preset", "epochs", "betas", "transform", ""][..]),
            value in prop_oneof!["\\PC{0,12}", "-?[0-9]{1,22}", "\\[[-0-9,. ]{0,9}\\]", "\\{[a-z=\"0-9, ]{0,20}\\}"],
            equals in prop::sample::select(&["=", "", "==", ".="][..]),
        ) {
            try_text(TINY.as_bytes(), &[&format!("{table}.{key}{equals}{value}")]);
            try_text(TINY.as_bytes(), &[&format!("{table}{equals}{value}")]);
            try_text(TINY.as_bytes(), &[&value]);
        }
    }
}
