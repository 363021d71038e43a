//! The rows of `docs/robustness.md`.
// long file: a list, one row per line or two.

use crate::common::{Folder, TINY};
use halfmode::data::numpy::{NpzArray, write_npy, write_npz};
use halfmode::train::{Entry, read_named, write_named};
use ndarray::{ArrayD, IxDyn};
use serde_json::{Value, json};

/// One thing that goes wrong.
pub(crate) struct Case {
    pub(crate) section: &'static str,
    pub(crate) what: &'static str,
    /// Makes the files that the command meets.
    pub(crate) prepare: fn(&Folder),
    /// What is typed.
    pub(crate) line: &'static str,
    pub(crate) code: i32,
    /// What the message must contain, whatever else it says.
    pub(crate) says: &'static [&'static str],
}

const fn case(
    section: &'static str,
    what: &'static str,
    line: &'static str,
    code: i32,
    says: &'static [&'static str],
    prepare: fn(&Folder),
) -> Case {
    Case { section, what, prepare, line, code, says }
}

fn nothing(_: &Folder) {}

/// `wrong.toml`: the tiny job with one text replaced.
fn toml(folder: &Folder, from: &str, to: &str) {
    assert!(TINY.contains(from));
    folder.write("wrong.toml", &TINY.replacen(from, to, 1));
}

fn bytes(folder: &Folder, name: &str, bytes: &[u8]) {
    std::fs::write(folder.join(name), bytes).unwrap();
}

/// `to` with all but the last hundred bytes of `from`.
fn cut(folder: &Folder, from: &str, to: &str) {
    let whole = std::fs::read(folder.join(from)).unwrap();
    bytes(folder, to, &whole[..whole.len() - 100]);
}

fn ramp(shape: &[usize]) -> ArrayD<f32> {
    let mut next = 0.0;
    ArrayD::from_shape_simple_fn(IxDyn(shape), || {
        next = (next + 0.37) % 1.0;
        next
    })
}

/// `pairs.npz` with arrays of these shapes, and a value of each replaced.
fn pairs(folder: &Folder, x: &[usize], y: &[usize], spoil: Option<(&str, f32)>) {
    let (mut x, mut y) = (ramp(x), ramp(y));
    if let Some((name, value)) = spoil {
        let array = if name == "x" { &mut x } else { &mut y };
        *array.iter_mut().nth(5).unwrap() = value;
    }
    let arrays = [("x", NpzArray::F32(x.view())), ("y", NpzArray::F32(y.view()))];
    write_npz(&folder.join("pairs.npz"), &arrays).unwrap();
}

/// `pairs.npz` as numpy writes complex arrays.
fn complex(folder: &Folder) {
    bytes(folder, "pairs.npz", include_bytes!("../../../../tests/golden/complex_training/arrays.npz"));
}

/// `pairs.npz` of good arrays, with bytes of the file replaced by as many others, or fewer and spaces.
fn patched(folder: &Folder, from: &[u8], to: &[u8]) {
    let mut to = to.to_vec();
    to.resize(from.len(), b' ');
    pairs(folder, &[4, 1, 16, 16], &[4, 1, 16, 16], None);
    let mut file = std::fs::read(folder.join("pairs.npz")).unwrap();
    let at = file.windows(from.len()).position(|part| part == from).unwrap();
    file[at..at + to.len()].copy_from_slice(&to);
    bytes(folder, "pairs.npz", &file);
}

/// `array.npy` with this header and 64 bytes of data.
fn npy(folder: &Folder, header: &str) {
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend([0; 64]);
    bytes(folder, "array.npy", &file);
}

/// `weights.safetensors` with this header, its length as said, and 8 bytes of data.
fn safetensors(folder: &Folder, header: &str, length: u64) {
    let mut file = length.to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend([0; 8]);
    bytes(folder, "weights.safetensors", &file);
}

fn header(folder: &Folder, header: &str) {
    safetensors(folder, header, header.len() as u64);
}

/// `model.safetensors`: the trained model with its metadata or its tensors changed.
fn model(folder: &Folder, change: impl Fn(&mut Value), keep: impl Fn(&str) -> bool) {
    let (arrays, mut metadata) = read_named(folder.join("run/checkpoints/best")).unwrap();
    change(&mut metadata);
    let kept = arrays.into_iter().filter(|(name, _)| keep(name));
    let entries: Vec<Entry<'_>> = kept.map(|(name, array)| Entry::values(name, &array.shape, array.values)).collect();
    write_named(folder.join("model.safetensors"), &entries, &metadata).unwrap();
}

/// `again`: a run with two checkpoints, fresh for each case.
fn again(folder: &Folder) {
    let _ = std::fs::remove_dir_all(folder.join("again"));
    let status = std::process::Command::new("cp").args(["-r", "run", "again"]).current_dir(&folder.path).status();
    assert!(status.unwrap().success());
}

/// `again` with the state of its newest checkpoint changed.
fn state(folder: &Folder, key: &str, value: Value) {
    again(folder);
    let latest = folder.join("again/checkpoints/latest");
    let (arrays, mut metadata) = read_named(&latest).unwrap();
    metadata["state"][key] = value;
    let entries = arrays.into_iter().map(|(name, array)| Entry::values(name, &array.shape, array.values));
    write_named(&latest, &entries.collect::<Vec<_>>(), &metadata).unwrap();
}

/// Makes the files that many cases share.
pub(crate) const FIXTURES: &[fn(&Folder)] = &[
    |folder| {
        let mut text = TINY.split("[data]").next().unwrap().to_owned();
        text.push_str("[data]\nkind = \"file\"\ntrain = \"pairs.npz\"\ntest = [\"pairs.npz\"]\n\n[model]");
        text.push_str(TINY.split("[model]").nth(1).unwrap());
        folder.write("file.toml", &text);
    },
    |folder| {
        write_npy(&folder.join("x.npy"), &ramp(&[2, 1, 16, 16]).view()).unwrap();
        folder.write("noise", "this is no array, no model and no configuration");
        bytes(folder, "no-text.toml", b"seed = 3 # \xff\xfe\n");
        folder.write("long.toml", &format!("seed = 3 # {}\n", "x".repeat(70_000)));
        folder.write("deep.toml", &format!("x = {}1{}\n", "[".repeat(10_000), "]".repeat(10_000)));
        folder.write("empty", "");
        std::fs::create_dir_all(folder.join("folder")).unwrap();
        std::os::unix::fs::symlink("loop", folder.join("loop")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(folder.join("pipe")).status().unwrap();
        assert!(made.success());
        let torch = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/torch/small.pt");
        std::fs::copy(torch, folder.join("small.pt")).unwrap();
        for name in ["block.h5", "latest.h5", "v5.mat", "classic.nc"] {
            let hdf5 = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/hdf5").join(name);
            std::fs::copy(hdf5, folder.join(name)).unwrap();
        }
    },
];

const CONFIG: &str = "Configuration";
const USAGE: &str = "Command line";
const TRAIN: &str = "Data to train on";
const FILES: &str = "Files of arrays";
const MODEL: &str = "Models";
const PREDICT: &str = "Prediction and evaluation";
const RUN: &str = "Run directories";
const MACHINE: &str = "The machine";

const PLAN: &str = "halfmode plan wrong.toml";
const COMPLEX: &str = "halfmode train file.toml --out other --set model.complex_data=true";
const FILE: &str = "halfmode train file.toml --out other";
const INSPECT: &str = "halfmode data inspect array.npy";
const WEIGHTS: &str = "halfmode inspect weights.safetensors";
const EVAL: &str = "halfmode eval model.safetensors --resolution 16";
const RESUME: &str = "halfmode train again --resume --plots 0";

/// Everything that is tried with one command.
pub(crate) const CASES: &[Case] = &[
    case(CONFIG, "unknown key", PLAN, 3, &["`n_mode`", "wrong.toml:12: model.n_mode", "`n_modes`"], |f| {
        toml(f, "n_modes", "n_mode")
    }),
    case(CONFIG, "unknown value", PLAN, 3, &["`dracy`", "`darcy`"], |f| toml(f, "\"darcy\"", "\"dracy\"")),
    case(CONFIG, "wrong type", PLAN, 3, &["wrong.toml:18: train.epochs", "two"], |f| {
        toml(f, "epochs = 2", "epochs = \"two\"")
    }),
    case(CONFIG, "a number that is no integer", PLAN, 3, &["train.epochs"], |f| toml(f, "epochs = 2", "epochs = 2.5")),
    case(CONFIG, "an integer beyond 64 bits", PLAN, 3, &["wrong.toml:1"], |f| {
        toml(f, "seed = 3", "seed = 99999999999999999999")
    }),
    case(CONFIG, "missing key", PLAN, 3, &["`hidden_channels` is missing"], |f| toml(f, "hidden_channels = 4\n", "")),
    case(CONFIG, "missing table", PLAN, 3, &["`data` is missing"], |f| f.write("wrong.toml", "seed = 1\n")),
    case(CONFIG, "empty file", "halfmode plan empty", 3, &["missing"], nothing),
    case(CONFIG, "duplicate key", PLAN, 3, &["duplicate key", "wrong.toml:2"], |f| {
        toml(f, "seed = 3", "seed = 3\nseed = 4")
    }),
    case(CONFIG, "duplicate table", PLAN, 3, &["duplicate"], |f| toml(f, "[train]", "[model]")),
    case(CONFIG, "broken syntax", PLAN, 3, &["not TOML", "wrong.toml:17"], |f| toml(f, "[train]", "[train")),
    case(CONFIG, "value out of range", PLAN, 3, &["train.batch_size"], |f| toml(f, "batch_size = 2", "batch_size = 0")),
    case(CONFIG, "negative learning rate", PLAN, 3, &["optimizer.learning_rate"], |f| toml(f, "5e-3", "-1.0")),
    case(CONFIG, "learning rate that is not a number", PLAN, 3, &["optimizer.learning_rate"], |f| {
        toml(f, "5e-3", "nan")
    }),
    case(CONFIG, "infinite learning rate", PLAN, 3, &["optimizer.learning_rate"], |f| toml(f, "5e-3", "inf")),
    case(CONFIG, "more modes than the grid has", PLAN, 3, &["model.n_modes", "16 points"], |f| {
        toml(f, "n_modes = [4, 4]", "n_modes = [4, 40]")
    }),
    case(
        CONFIG,
        "more layers than anyone has",
        "halfmode plan tiny.toml --set model.n_layers=60000",
        3,
        &["between 1 and 1024"],
        nothing,
    ),
    case(CONFIG, "no modes", PLAN, 3, &["model.n_modes"], |f| toml(f, "n_modes = [4, 4]", "n_modes = []")),
    case(CONFIG, "seven axes for data of two", PLAN, 3, &["1 to 3 axes"], |f| {
        toml(f, "n_modes = [4, 4]", "n_modes = [2,2,2,2,2,2,2]")
    }),
    case(CONFIG, "resolution beyond the solver's", PLAN, 3, &["data.resolution", "1024"], |f| {
        toml(f, "resolution = 16", "resolution = 100000")
    }),
    case(CONFIG, "no test resolutions", PLAN, 3, &["data.test_resolutions"], |f| toml(f, "[16, 20]", "[]")),
    case(
        CONFIG,
        "TF32 on a CPU",
        "halfmode plan tiny.toml --device cpu --set precision.compute=tf32",
        3,
        &["NVIDIA GPUs"],
        nothing,
    ),
    case(
        CONFIG,
        "half format that is none",
        "halfmode plan tiny.toml --set precision.format=f32",
        3,
        &["not a half format"],
        nothing,
    ),
    case(
        CONFIG,
        "unknown preset of precision",
        "halfmode plan tiny.toml --set precision.preset=mixd",
        3,
        &["`mixed`"],
        nothing,
    ),
    case(
        CONFIG,
        "sums in half precision",
        "halfmode plan tiny.toml --set 'precision.transform={storage=\"f16\",accumulate=\"f16\"}'",
        3,
        &["accumulate"],
        nothing,
    ),
    case(CONFIG, "`--set` without a value", "halfmode plan tiny.toml --set train.epochs", 3, &["KEY=VALUE"], nothing),
    case(CONFIG, "`--set` of an unknown key", "halfmode plan tiny.toml --set trian.epochs=1", 3, &["`train`"], nothing),
    case(
        CONFIG,
        "`--set` of a key below a value",
        "halfmode plan tiny.toml --set train.epochs.x=1",
        3,
        &["not a table"],
        nothing,
    ),
    case(CONFIG, "`--set` of nothing", "halfmode plan tiny.toml --set =", 3, &["not a key"], nothing),
    case(
        CONFIG,
        "`--set` with ten thousand brackets",
        "halfmode plan tiny.toml --set model.n_modes=$(printf '[%.0s' {1..10000}) 2>&1 | tail -c 200 >&2; exit ${PIPESTATUS[0]}",
        3,
        &[],
        nothing,
    ),
    case(CONFIG, "misspelt preset", "halfmode train darcyy", 3, &["nearest preset is `darcy`"], nothing),
    case(CONFIG, "bytes that are no text", "halfmode plan no-text.toml", 3, &["UTF-8"], nothing),
    case(CONFIG, "a line of 70 000 characters", "halfmode plan long.toml", 3, &["longer than 64 KiB"], nothing),
    case(CONFIG, "ten thousand brackets", "halfmode plan deep.toml", 3, &["not TOML"], nothing),
    case(CONFIG, "a device that never ends", "halfmode plan /dev/zero", 3, &["longer than 64 KiB"], nothing),
    case(CONFIG, "a symbolic link to itself", "halfmode plan loop", 3, &["loop"], nothing),
    case(CONFIG, "a folder that is no run", "halfmode plan folder", 3, &["config.toml"], nothing),
    case(CONFIG, "a path that is no text", "halfmode plan $'wrong\\xff.toml'", 2, &["UTF-8"], nothing),
    case(
        CONFIG,
        "negative viscosity",
        "halfmode plan tiny.toml --set 'data={kind=\"navier-stokes\",viscosity=-1.0}'",
        3,
        &["data.viscosity"],
        nothing,
    ),
    case(
        CONFIG,
        "no samples of flows",
        "halfmode plan tiny.toml --set 'data={kind=\"navier-stokes\",n_train=0}'",
        3,
        &["data.n_train"],
        nothing,
    ),
    case(
        CONFIG,
        "misspelt key of flows",
        "halfmode plan tiny.toml --set 'data={kind=\"navier-stokes\",viscocity=1.0}'",
        3,
        &["`viscosity`"],
        nothing,
    ),
    case(
        CONFIG,
        "data of one axis for a model of two",
        "halfmode plan tiny.toml --set 'data={kind=\"burgers\"}'",
        3,
        &["one axis"],
        nothing,
    ),
    case(USAGE, "unknown command", "halfmode trian", 2, &["trian"], nothing),
    case(USAGE, "unknown argument", "halfmode train darcy --epoch 3", 2, &["--epoch"], nothing),
    case(USAGE, "usage error for a program", "halfmode train --json | grep -q '\"code\":2' && exit 2", 2, &[], nothing),
    case(USAGE, "too many threads", "halfmode plan darcy --threads 5000", 2, &["5000", "1024"], nothing),
    case(USAGE, "negative threads", "halfmode plan darcy --threads=-1", 2, &["-1"], nothing),
    case(USAGE, "negative seed", "halfmode plan darcy --seed=-1", 2, &["-1"], nothing),
    case(USAGE, "unknown device", "halfmode plan darcy --device tpu", 2, &["auto, cpu or cuda"], nothing),
    case(
        USAGE,
        "device that is not there",
        "halfmode train tiny.toml --device cuda:4711",
        6,
        &["device cuda:4711 is not available", "help: halfmode doctor"],
        nothing,
    ),
    case(
        USAGE,
        "contradicting arguments",
        "halfmode train darcy --resume --force",
        2,
        &["cannot be used with"],
        nothing,
    ),
    case(USAGE, "unknown precision", "halfmode eval run --precision double", 2, &["full, amp, mixed, half"], nothing),
    case(USAGE, "memory that is no number", "halfmode plan darcy --memory big", 2, &["not a number"], nothing),
    case(
        USAGE,
        "empty output grid",
        "halfmode predict --model run --input x.npy --output y.npy --output-shape 0,8",
        2,
        &["0"],
        nothing,
    ),
    case(TRAIN, "missing file", FILE, 4, &["pairs.npz", "halfmode data generate"], |f| {
        drop(std::fs::remove_file(f.join("pairs.npz")))
    }),
    case(TRAIN, "cut off", FILE, 4, &["pairs.npz"], |f| {
        pairs(f, &[4, 1, 16, 16], &[4, 1, 16, 16], None);
        cut(f, "pairs.npz", "pairs.npz")
    }),
    case(TRAIN, "no archive", FILE, 4, &["not a readable .npz archive"], |f| f.write("pairs.npz", "x and y")),
    case(TRAIN, "a flipped bit", FILE, 4, &["checksum"], |f| {
        patched(f, &0.37f32.to_le_bytes(), &0.38f32.to_le_bytes())
    }),
    case(TRAIN, "missing array", FILE, 4, &["no array `y`", "`x`"], |f| {
        write_npz(&f.join("pairs.npz"), &[("x", NpzArray::F32(ramp(&[4, 1, 16, 16]).view()))]).unwrap()
    }),
    case(TRAIN, "other number of outputs than of inputs", FILE, 4, &["number of samples", "4 and 3"], |f| {
        pairs(f, &[4, 1, 16, 16], &[3, 1, 16, 16], None)
    }),
    case(TRAIN, "other grid of outputs than of inputs", FILE, 4, &["different grids"], |f| {
        pairs(f, &[4, 1, 16, 16], &[4, 1, 16, 12], None)
    }),
    case(TRAIN, "channels that the model does not have", FILE, 4, &["1 channels in"], |f| {
        pairs(f, &[4, 3, 16, 16], &[4, 1, 16, 16], None)
    }),
    case(TRAIN, "grid coarser than the modes", FILE, 3, &["model.n_modes"], |f| {
        pairs(f, &[4, 1, 2, 2], &[4, 1, 2, 2], None)
    }),
    case(TRAIN, "array without axes", FILE, 4, &["at least 3 axes"], |f| pairs(f, &[], &[], None)),
    case(TRAIN, "array of one axis", FILE, 4, &["at least 3 axes"], |f| pairs(f, &[16], &[16], None)),
    case(TRAIN, "array of seven axes", FILE, 4, &["2 spatial axes"], |f| {
        pairs(f, &[4, 1, 2, 2, 2, 2, 2], &[4, 1, 2, 2, 2, 2, 2], None)
    }),
    case(
        TRAIN,
        "complex numbers for a model of real fields",
        "halfmode train file.toml --out other --set data.input=c8 --set data.output=c16",
        4,
        &["holds complex numbers", "set model.complex_data = true"],
        complex,
    ),
    case(TRAIN, "real and imaginary part for a model of real fields", FILE, 4, &["model.complex_data = true"], |f| {
        pairs(f, &[4, 1, 16, 16, 2], &[4, 1, 16, 16, 2], None)
    }),
    case(TRAIN, "real numbers for a model of complex fields", COMPLEX, 4, &["set model.complex_data = false"], |f| {
        pairs(f, &[4, 1, 16, 16], &[4, 1, 16, 16], None)
    }),
    case(
        TRAIN,
        "generated data for a model of complex fields",
        "halfmode train tiny.toml --out other --set model.complex_data=true",
        3,
        &["model.complex_data", "real"],
        nothing,
    ),
    case(TRAIN, "no samples", FILE, 4, &["at least one sample"], |f| pairs(f, &[0, 1, 16, 16], &[0, 1, 16, 16], None)),
    case(TRAIN, "empty grid", FILE, 4, &["empty"], |f| pairs(f, &[4, 1, 0, 16], &[4, 1, 0, 16], None)),
    case(TRAIN, "NaN among the inputs", FILE, 4, &["`x` holds NaN", "[0, 0, 0, 5]"], |f| {
        pairs(f, &[4, 1, 16, 16], &[4, 1, 16, 16], Some(("x", f32::NAN)))
    }),
    case(TRAIN, "infinity among the outputs", FILE, 4, &["`y` holds inf"], |f| {
        pairs(f, &[4, 1, 16, 16], &[4, 1, 16, 16], Some(("y", f32::INFINITY)))
    }),
    case(TRAIN, "header that promises more than there is", FILE, 4, &["pairs.npz[x]"], |f| {
        patched(f, b"(4, 1, 16, 16)", b"(4, 1, 16, 96)")
    }),
    case(TRAIN, "header that promises terabytes", FILE, 6, &["memory"], |f| {
        patched(f, b"(4, 1, 16, 16)}       ", b"(99999999, 1, 99, 99)}")
    }),
    case(TRAIN, "header beyond any memory", FILE, 4, &["too large"], |f| {
        patched(f, b"(4, 1, 16, 16)}             ", b"(999999999999, 1, 99999999)}")
    }),
    case(TRAIN, "negative axis", FILE, 4, &["not a length"], |f| patched(f, b"(4, 1, 16, 16)", b"(4, 1, -6, 16)")),
    case(TRAIN, "a folder", "halfmode train file.toml --out other --set data.train=folder", 4, &["directory"], |f| {
        pairs(f, &[4, 1, 16, 16], &[4, 1, 16, 16], None)
    }),
    case(
        TRAIN,
        "a pipe without a writer",
        "halfmode train file.toml --out other --set data.train=pipe",
        4,
        &["pipe"],
        nothing,
    ),
    case(
        TRAIN,
        "a device that never ends",
        "halfmode train file.toml --out other --set data.train=/dev/zero",
        4,
        &["/dev/zero"],
        nothing,
    ),
    case(
        TRAIN,
        "a symbolic link to itself",
        "halfmode train file.toml --out other --set data.train=loop",
        4,
        &["loop"],
        nothing,
    ),
    case(FILES, "missing file", "halfmode data inspect none.npz", 4, &["none.npz"], nothing),
    case(
        FILES,
        ".h5 that ends in its header",
        "halfmode data import data.h5 -o data.npz",
        4,
        &["HDF5", "data.h5"],
        |f| bytes(f, "data.h5", b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0"),
    ),
    case(FILES, ".h5 cut off", "halfmode data import cut.h5 -o data.npz", 4, &["HDF5", "cut.h5"], |f| {
        cut(f, "latest.h5", "cut.h5")
    }),
    case(FILES, ".h5 that is something else", "halfmode data inspect text.h5", 4, &["no .npz", "HDF5 file"], |f| {
        f.write("text.h5", "not a header of HDF5, of zip or of NumPy")
    }),
    case(FILES, ".h5 with a huge shape", "halfmode data inspect huge.h5", 6, &["memory"], |f| {
        let mut file = std::fs::read(f.join("block.h5")).unwrap();
        let shape: Vec<u8> = [2u64, 3, 4].iter().flat_map(|n| n.to_le_bytes()).collect();
        let at = file.windows(shape.len()).position(|part| part == shape).unwrap();
        file[at..at + 8].copy_from_slice(&(1u64 << 50).to_le_bytes());
        bytes(f, "huge.h5", &file)
    }),
    case(
        FILES,
        ".h5 with text and records beside numbers",
        "halfmode data import latest.h5 -o numbers.npz",
        0,
        &["texts is left out: text", "records with fields a, b"],
        nothing,
    ),
    case(FILES, ".mat of version 5", "halfmode data import v5.mat -o data.npz", 4, &["-v7.3", "loadmat"], nothing),
    case(FILES, ".nc of classic NetCDF", "halfmode data inspect classic.nc", 4, &["nccopy"], nothing),
    case(FILES, "empty file", "halfmode data inspect empty", 4, &["empty"], nothing),
    case(FILES, "text", "halfmode data inspect noise", 4, &["no .npz, .npy, .safetensors, .pt or HDF5"], nothing),
    case(FILES, "a folder", "halfmode data inspect folder", 4, &["directory"], nothing),
    case(FILES, "a device that never ends", "halfmode data inspect /dev/zero", 4, &["device"], nothing),
    case(FILES, "a pipe without a writer", "halfmode data inspect pipe", 4, &["pipe"], nothing),
    case(FILES, ".npy that ends in its header", INSPECT, 4, &["ends inside the header"], |f| {
        bytes(f, "array.npy", b"\x93NUMPY\x01\x00\xff\xffabc")
    }),
    case(FILES, ".npy of an unknown version", INSPECT, 4, &["version 9"], |f| {
        bytes(f, "array.npy", b"\x93NUMPY\x09\x00\x00\x00")
    }),
    case(FILES, ".npy whose header is no dictionary", INSPECT, 4, &["dictionary"], |f| npy(f, "((((((((((")),
    case(FILES, ".npy with a huge shape", INSPECT, 4, &["truncated"], |f| {
        npy(f, "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}")
    }),
    case(FILES, ".npy with a shape beyond any memory", INSPECT, 4, &["too large"], |f| {
        npy(f, "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999999999)}")
    }),
    case(FILES, ".npy of text", INSPECT, 4, &["`<U5`"], |f| {
        npy(f, "{'descr': '<U5', 'fortran_order': False, 'shape': (3,)}")
    }),
    case(FILES, ".npy of extended complex numbers", INSPECT, 4, &["`<c32`"], |f| {
        npy(f, "{'descr': '<c32', 'fortran_order': False, 'shape': (3,)}")
    }),
    case(FILES, ".npy of objects", INSPECT, 4, &["`|O`"], |f| {
        npy(f, "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}")
    }),
    case(FILES, ".npy cut off", INSPECT, 4, &["truncated"], |f| cut(f, "x.npy", "array.npy")),
    case(FILES, ".npz cut off", "halfmode data inspect cut.npz", 4, &["cut.npz"], |f| {
        pairs(f, &[4, 1, 16, 16], &[4, 1, 16, 16], None);
        cut(f, "pairs.npz", "cut.npz")
    }),
    case(FILES, ".safetensors with a header of 2⁶⁴ bytes", WEIGHTS, 7, &["18446744073709551615"], |f| {
        safetensors(f, "{}", u64::MAX)
    }),
    case(FILES, ".safetensors whose header is longer than the file", WEIGHTS, 7, &["header claims"], |f| {
        safetensors(f, "{}", 100)
    }),
    case(FILES, ".safetensors with overlapping tensors", WEIGHTS, 7, &["header"], |f| {
        header(
            f,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
        )
    }),
    case(FILES, ".safetensors with a tensor beyond its end", WEIGHTS, 7, &["fill 4000 bytes, but 8"], |f| {
        header(f, r#"{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}"#)
    }),
    case(FILES, ".safetensors with a negative axis", WEIGHTS, 7, &["-2"], |f| {
        header(f, r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#)
    }),
    case(FILES, ".safetensors with a shape that overflows", WEIGHTS, 7, &["header"], |f| {
        header(f, r#"{"a":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,8]}}"#)
    }),
    case(FILES, ".safetensors with ten thousand brackets", WEIGHTS, 7, &["recursion"], |f| {
        header(f, &format!(r#"{{"a":{{"dtype":"F32","more":{}"#, "[".repeat(10_000)))
    }),
    case(FILES, ".safetensors of integers", WEIGHTS, 7, &["U64"], |f| {
        header(f, r#"{"a":{"dtype":"U64","shape":[1],"data_offsets":[0,8]}}"#)
    }),
    case(FILES, ".pt cut off", "halfmode data inspect cut.pt", 4, &["cut.pt"], |f| cut(f, "small.pt", "cut.pt")),
    case(
        FILES,
        "two files with one name in them",
        "halfmode data import x.npy x.npy -o all.npz",
        4,
        &["two files hold an array `x`"],
        nothing,
    ),
    case(
        FILES,
        "a name that is no text",
        "cp x.npy $'x\\xff.npy' && halfmode data inspect $'x\\xff.npy' --json >/dev/null",
        0,
        &[],
        nothing,
    ),
    case(FILES, "samples: none", "halfmode data generate darcy --n 0 -o x.npz", 3, &["`n`"], nothing),
    case(
        FILES,
        "samples: no points",
        "halfmode data generate navier-stokes --resolution 0 -o x.npz",
        3,
        &["`resolution`"],
        nothing,
    ),
    case(
        FILES,
        "samples: negative viscosity",
        "halfmode data generate burgers --viscosity=-0.1 -o x.npz",
        3,
        &["`viscosity`"],
        nothing,
    ),
    case(
        FILES,
        "samples: a setting of another problem",
        "halfmode data generate burgers --forcing 1 -o x.npz",
        2,
        &["--forcing"],
        nothing,
    ),
    case(
        FILES,
        "samples of flows: more than memory",
        "ulimit -v 1000000; halfmode data generate navier-stokes --n 1000000 -o more.npz",
        6,
        &["memory"],
        nothing,
    ),
    case(
        FILES,
        "samples: more than memory",
        "ulimit -v 1000000; halfmode data generate darcy --n 1000000 --resolution 64 -o more.npz",
        6,
        &["memory"],
        nothing,
    ),
    case(
        FILES,
        "samples to a path below a file",
        "halfmode data generate darcy --n 1 --resolution 8 -o noise/x.npz",
        1,
        &["noise"],
        nothing,
    ),
    case(
        FILES,
        "samples to a full disk",
        "halfmode data generate darcy --n 1 --resolution 8 -o /dev/full",
        1,
        &["No space left"],
        nothing,
    ),
    case(
        FILES,
        "samples to a folder",
        "halfmode data generate darcy --n 1 --resolution 8 -o folder",
        1,
        &["directory"],
        nothing,
    ),
    case(FILES, "samples to a device", "halfmode data import x.npy -o /dev/null && test -c /dev/null", 0, &[], nothing),
    case(MODEL, "no model file", "halfmode eval noise", 7, &["header"], nothing),
    case(MODEL, "missing file", "halfmode eval none.safetensors", 7, &["none.safetensors"], nothing),
    case(MODEL, "cut off", EVAL, 7, &["model.safetensors"], |f| cut(f, "run/checkpoints/best", "model.safetensors")),
    case(MODEL, "weights without metadata", EVAL, 7, &["not written by halfmode"], |f| {
        model(f, |it| *it = Value::Null, |_| true)
    }),
    case(MODEL, "metadata of a later version", EVAL, 7, &["format version 99"], |f| {
        model(f, |it| it["format_version"] = json!(99), |_| true)
    }),
    case(MODEL, "metadata of a wrong type", EVAL, 7, &["metadata that cannot be used"], |f| {
        model(f, |it| it["config"] = json!("fno"), |_| true)
    }),
    case(MODEL, "missing tensor", EVAL, 7, &["projection.fcs.0.weight", "nothing"], |f| {
        model(f, |_| (), |name| name != "projection.fcs.0.weight")
    }),
    case(MODEL, "tensors of another width than the metadata say", EVAL, 7, &["should have shape"], |f| {
        model(f, |it| it["config"]["hidden_channels"] = json!(8), |_| true)
    }),
    case(MODEL, "metadata that claim the largest model", EVAL, 7, &["should have shape"], |f| {
        model(f, |it| it["config"]["hidden_channels"] = json!(65536), |_| true)
    }),
    case(MODEL, "statistics of other channels than the model has", EVAL, 7, &["statistics"], |f| {
        model(
            f,
            |it| {
                it["normalisers"]["input"]["shape"] = json!([1, 2, 1, 1]);
                it["normalisers"]["input"]["mean"] = json!([0.0, 0.0]);
                it["normalisers"]["input"]["std"] = json!([1.0, 1.0])
            },
            |_| true,
        )
    }),
    case(MODEL, "a run whose configuration is damaged", "halfmode eval again", 7, &["again/config.toml"], |f| {
        again(f);
        f.write("again/config.toml", "seed = ")
    }),
    case(MODEL, "a folder that is no run", "halfmode eval folder", 7, &["not a run directory"], nothing),
    case(
        MODEL,
        "import: no JSON",
        "halfmode import neuraloperator --config noise --weights run/checkpoints/best -o new.safetensors",
        3,
        &["not JSON"],
        nothing,
    ),
    case(
        MODEL,
        "import: ten thousand brackets",
        "halfmode import neuraloperator --config deep.json --weights run/checkpoints/best -o new.safetensors",
        3,
        &["recursion"],
        |f| f.write("deep.json", &"[".repeat(10_000)),
    ),
    case(
        MODEL,
        "import: a device that never ends",
        "halfmode import neuraloperator --config /dev/zero --weights run/checkpoints/best -o new.safetensors",
        3,
        &["64 KiB"],
        nothing,
    ),
    case(
        MODEL,
        "import: another class",
        "halfmode import neuraloperator --config class.json --weights run/checkpoints/best -o new.safetensors",
        3,
        &["UNO"],
        |f| f.write("class.json", r#"{"class": "UNO"}"#),
    ),
    case(
        MODEL,
        "import: weights of another model",
        "halfmode import neuraloperator --config other.json --weights run/checkpoints/best -o new.safetensors",
        7,
        &["should have shape"],
        |f| {
            f.write(
                "other.json",
                r#"{"class": "FNO", "n_modes": [8, 8], "hidden_channels": 8, "in_channels": 1, "out_channels": 1}"#,
            )
        },
    ),
    case(
        PREDICT,
        "NaN among the inputs",
        "halfmode predict --model run --input nan.npy --output y.npy",
        0,
        &["the input holds NaN"],
        |f| write_npy(&f.join("nan.npy"), &ArrayD::from_elem(IxDyn(&[1, 1, 16, 16]), f32::NAN).view()).unwrap(),
    ),
    case(
        PREDICT,
        "complex numbers for a model of real fields",
        "halfmode predict --model run --input pairs.npz --key c8 --output y.npy",
        4,
        &["`c8` holds complex numbers", "model.complex_data = true"],
        complex,
    ),
    case(PREDICT, "NaN in data to evaluate on", "halfmode eval run --data pairs.npz", 4, &["`y` holds NaN"], |f| {
        pairs(f, &[2, 1, 16, 16], &[2, 1, 16, 16], Some(("y", f32::NAN)))
    }),
    case(
        PREDICT,
        "channels that the model does not have",
        "halfmode predict --model run --input two.npy --output y.npy",
        4,
        &["[samples, 1, 2 spatial axes]"],
        |f| write_npy(&f.join("two.npy"), &ramp(&[1, 2, 16, 16]).view()).unwrap(),
    ),
    case(
        PREDICT,
        "axes that the model does not have",
        "halfmode predict --model run --input flat.npy --output y.npy",
        4,
        &["2 spatial axes"],
        |f| write_npy(&f.join("flat.npy"), &ramp(&[1, 1, 16]).view()).unwrap(),
    ),
    case(
        PREDICT,
        "no samples",
        "halfmode predict --model run --input none.npy --output y.npy",
        4,
        &["nothing in it"],
        |f| write_npy(&f.join("none.npy"), &ramp(&[0, 1, 16, 16]).view()).unwrap(),
    ),
    case(
        PREDICT,
        "array that is not in the file",
        "halfmode predict --model run --input pairs.npz --key q --output y.npy",
        4,
        &["no array `q`"],
        nothing,
    ),
    case(
        PREDICT,
        "missing input",
        "halfmode predict --model run --input nothing.npy --output y.npy",
        4,
        &["nothing.npy"],
        nothing,
    ),
    case(
        PREDICT,
        "output that is a folder",
        "halfmode predict --model run --input x.npy --output folder",
        1,
        &["directory"],
        nothing,
    ),
    case(
        PREDICT,
        "output below a file",
        "halfmode predict --model run --input x.npy --output noise/y.npy",
        1,
        &["noise/y.npy"],
        nothing,
    ),
    case(
        PREDICT,
        "output in a folder that is not there",
        "halfmode predict --model run --input x.npy --output gone/y.npy",
        1,
        &["gone/y.npy"],
        nothing,
    ),
    case(
        PREDICT,
        "output to a full disk",
        "halfmode predict --model run --input x.npy --output /dev/full",
        1,
        &["No space left"],
        nothing,
    ),
    case(
        PREDICT,
        "output larger than the memory",
        "halfmode predict --model run --input x.npy --output y.npy --output-shape 1000000,1000000",
        6,
        &["memory"],
        nothing,
    ),
    case(
        PREDICT,
        "output whose name is no text",
        "halfmode predict --model run --input x.npy --output $'y\\xff.npy' --json >/dev/null",
        0,
        &[],
        nothing,
    ),
    case(
        PREDICT,
        "resolution coarser than the modes",
        "halfmode eval run --resolution 2",
        3,
        &["the model keeps"],
        nothing,
    ),
    case(PREDICT, "resolution beyond the solver's", "halfmode eval run --resolution 99999", 3, &["99999"], nothing),
    case(PREDICT, "resolution of nothing", "halfmode eval run --resolution 0", 3, &["resolution 0"], nothing),
    case(RUN, "a run that is there", "halfmode train tiny.toml --out run", 2, &["is not empty", "--resume"], nothing),
    case(RUN, "a file", "halfmode train tiny.toml --out noise", 2, &["is a file"], nothing),
    case(RUN, "below a file", "halfmode train tiny.toml --out noise/run", 1, &["noise/run"], nothing),
    case(
        RUN,
        "nothing to resume",
        "halfmode train tiny.toml --out fresh --resume",
        7,
        &["no checkpoint to resume from", "help: halfmode train tiny.toml --out fresh"],
        nothing,
    ),
    case(
        RUN,
        "killed before the first checkpoint",
        "halfmode train again --resume --plots 0",
        0,
        &["the run begins again"],
        |f| {
            again(f);
            for name in ["checkpoints", "plots"] {
                std::fs::remove_dir_all(f.join("again").join(name)).unwrap()
            }
        },
    ),
    case(
        RUN,
        "newest checkpoint cut off",
        RESUME,
        7,
        &["again/checkpoints/latest", "--resume-from again/checkpoints/step-00000004.safetensors"],
        |f| {
            again(f);
            cut(f, "again/checkpoints/latest", "again/checkpoints/latest");
            cut(f, "again/checkpoints/step-00000008.safetensors", "again/checkpoints/step-00000008.safetensors")
        },
    ),
    case(RUN, "a turned bit in the newest checkpoint", RESUME, 7, &["checksum", "--resume-from"], |f| {
        again(f);
        let latest = f.join("again/checkpoints/latest");
        let mut file = std::fs::read(&latest).unwrap();
        let last = file.len() - 1;
        file[last] ^= 1;
        std::fs::write(&latest, file).unwrap();
    }),
    case(
        RUN,
        "an older checkpoint instead",
        "halfmode train again --resume-from again/checkpoints/step-00000004.safetensors --plots 0",
        0,
        &[],
        nothing,
    ),
    case(RUN, "all checkpoints cut off", RESUME, 7, &["--force"], |f| {
        again(f);
        for name in ["latest", "step-00000004.safetensors", "step-00000008.safetensors"] {
            f.write(&format!("again/checkpoints/{name}"), "cut")
        }
    }),
    case(RUN, "newest checkpoint without a training state", RESUME, 7, &["no training state"], |f| {
        again(f);
        drop(std::fs::copy(f.join("run/checkpoints/best"), f.join("again/checkpoints/latest")))
    }),
    case(
        RUN,
        "newest checkpoint of another model",
        "halfmode train again --resume --set model.hidden_channels=8",
        7,
        &["another model", "help: halfmode train again --resume"],
        again,
    ),
    case(RUN, "newest checkpoint with a count beyond counting", RESUME, 7, &["counts that no run reaches"], |f| {
        state(f, "step", json!(u64::MAX))
    }),
    case(RUN, "newest checkpoint with a negative count", RESUME, 7, &["metadata that cannot be used"], |f| {
        state(f, "epoch", json!(-1))
    }),
    case(RUN, "newest checkpoint with a loss scale that is none", RESUME, 7, &["scale"], |f| {
        again(f);
        let latest = f.join("again/checkpoints/latest");
        let (arrays, mut metadata) = read_named(&latest).unwrap();
        metadata["state"]["scaler"]["scale"] = json!(3.0);
        let entries: Vec<Entry<'_>> =
            arrays.into_iter().map(|(name, array)| Entry::values(name, &array.shape, array.values)).collect();
        write_named(&latest, &entries, &metadata).unwrap()
    }),
    case(
        RUN,
        "other configuration than before",
        "halfmode train again --resume --plots 0 --set train.epochs=3",
        0,
        &["train.epochs: 2 -> 3"],
        again,
    ),
    case(RUN, "damaged metrics", RESUME, 7, &["metrics.jsonl:1", "help: mv again/metrics.jsonl"], |f| {
        again(f);
        f.write("again/metrics.jsonl", "{\"epoch\": }\n")
    }),
    case(RUN, "report of a folder that is no run", "halfmode report folder", 7, &["not a run directory"], nothing),
    case(RUN, "report of a run whose summary is damaged", "halfmode report again", 7, &["summary.json"], |f| {
        again(f);
        f.write("again/summary.json", "{")
    }),
    case(
        MACHINE,
        "batch beyond the memory",
        "halfmode train tiny.toml --out other --set data.n_train=1000000 --set data.resolution=1024 --set train.batch_size=1000000",
        6,
        &["memory"],
        nothing,
    ),
    case(
        MACHINE,
        "model beyond the memory",
        "halfmode bench step tiny.toml --set model.hidden_channels=65536 --set model.n_layers=64",
        6,
        &["memory"],
        nothing,
    ),
    case(
        MACHINE,
        "addresses limited",
        "ulimit -v 400000; halfmode bench step tiny.toml --threads 1 --set data.resolution=1024 --set model.hidden_channels=64",
        6,
        &["memory"],
        nothing,
    ),
    case(
        MACHINE,
        "no space for the first file of a run",
        "(ulimit -f 0; halfmode train tiny.toml --out limited --plots 0)",
        1,
        &["no space left"],
        nothing,
    ),
    case(
        MACHINE,
        "no space for the first checkpoint",
        "(ulimit -f 8; halfmode train tiny.toml --out limited-2 --plots 0)",
        1,
        &["no space left", "checkpoints"],
        nothing,
    ),
    case(
        MACHINE,
        "a cache that cannot be written",
        "halfmode train tiny.toml --out uncached --plots 0 --data-cache noise/cache",
        0,
        &[],
        nothing,
    ),
    case(
        MACHINE,
        "a damaged cache",
        "halfmode eval run --resolution 16 --data-cache cache && for it in cache/*; do head -c 999 $it > cut; cat cut > $it; done && halfmode eval run --resolution 16 --data-cache cache",
        0,
        &["ignored the cached data"],
        nothing,
    ),
    case(
        MACHINE,
        "a reader that goes away",
        "halfmode plan darcy | head -c 1 > /dev/null; exit ${PIPESTATUS[0]}",
        0,
        &[],
        nothing,
    ),
    case(MACHINE, "closed streams", "halfmode doctor >&- 2>&-", 0, &[], nothing),
    case(MACHINE, "results to a full disk", "halfmode doctor > /dev/full", 1, &["cannot write to stdout"], nothing),
];

/// What takes more than one command: what happens, what must hold, and the test that shows it.
pub(crate) const FAULTS: &[(&str, &str, &str)] = &[
    (
        "training diverges",
        "exit 5, with the last good checkpoint and a smaller learning rate to try",
        "train::a_run_that_diverges_names_its_checkpoint",
    ),
    (
        "`kill -9` at 20 random moments of a run",
        "resumed each time, the run ends with the same weights, bit for bit",
        "killed::twenty_kills_change_nothing",
    ),
    ("`kill -9` before the first checkpoint", "`--resume` begins again", "killed::a_kill_before_the_first_checkpoint"),
    (
        "`kill -9` while data are stored in the cache",
        "the next run makes them again; nothing is left over",
        "killed::a_kill_while_the_cache_is_written",
    ),
    (
        "Ctrl-C during training",
        "a checkpoint, exit 130; the resumed run is the undisturbed one",
        "train::ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_been",
    ),
    (
        "SIGTERM during training",
        "a checkpoint, exit 75; the resumed run is the undisturbed one",
        "train::sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been",
    ),
    (
        "Ctrl-C and SIGTERM while data are made",
        "exit 130 and 75 at once, no file",
        "faults::signals_while_data_are_made",
    ),
    ("Ctrl-C twice", "the program ends at once; the run can be resumed", "faults::a_second_ctrl_c_ends_at_once"),
    (
        "the disk fills up during a checkpoint",
        "exit 1; the checkpoint before is whole and resumes to the same weights",
        "faults::a_full_disk_keeps_the_last_checkpoint",
    ),
    (
        "two runs in one directory at once",
        "the second is refused with exit 2, the first is not disturbed",
        "faults::two_runs_in_one_directory",
    ),
];
