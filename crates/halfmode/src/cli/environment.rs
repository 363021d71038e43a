//! Facts about machine and program, for `doctor`, `environment.json` and the report.

use crate::cli::{device_name, gpu, memory};
use halfmode::tensor::Device;
use std::collections::BTreeMap;

/// Instruction sets that halfmode's kernels, or those of its libraries, make use of.
pub(crate) const FEATURES: [(&str, &str); 10] = [
    ("avx2", "256-bit vectors"),
    ("fma", "fused multiply-add"),
    ("f16c", "conversion between f16 and f32 in hardware"),
    ("avx512f", "512-bit vectors"),
    ("avx512bw", "512-bit vectors of 16-bit numbers"),
    ("avx512_bf16", "products of bf16 (not used by this build)"),
    ("avx512_fp16", "arithmetic in f16 (not used by this build)"),
    ("amx_tile", "matrix tiles (not used by this build)"),
    ("amx_bf16", "matrix products of bf16 (not used by this build)"),
    ("amx_fp16", "matrix products of f16 (not used by this build)"),
];

/// What the system says about the processor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cpu {
    /// Its name.
    pub(crate) model: Option<String>,
    /// Cores that this process may use.
    pub(crate) n_cores: usize,
    /// The flags of [`FEATURES`] that it has; unknown where the system does not list flags.
    pub(crate) features: BTreeMap<&'static str, Option<bool>>,
}

impl Cpu {
    pub(crate) fn detect() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |key: &str| {
            info.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                (name.trim() == key).then(|| value.trim().to_owned())
            })
        };
        let flags = field("flags").or_else(|| field("Features"));
        let has = |name: &str| flags.as_ref().map(|flags| flags.split_whitespace().any(|flag| flag == name));
        Cpu {
            model: field("model name"),
            n_cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            features: FEATURES.iter().map(|&(name, _)| (name, has(name))).collect(),
        }
    }

    /// The features that are there, in one line.
    pub(crate) fn present(&self) -> String {
        let names = FEATURES.iter().map(|&(name, _)| name);
        names.filter(|name| self.features.get(name).copied().flatten() == Some(true)).collect::<Vec<_>>().join(" ")
    }
}

/// The facts that are stored with a run.
pub(crate) fn facts(device: &Device, n_threads: usize) -> BTreeMap<String, String> {
    let cpu = Cpu::detect();
    let mut facts = BTreeMap::new();
    let mut put = |key: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            facts.insert(key.to_owned(), value);
        }
    };
    put("halfmode", Some(env!("CARGO_PKG_VERSION").to_owned()));
    put("build", Some(if cfg!(debug_assertions) { "debug" } else { "release" }.to_owned()));
    put("system", Some(format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)));
    put("kernel", std::fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned()));
    put("cpu", cpu.model.clone());
    put("cores", Some(cpu.n_cores.to_string()));
    put("cpu features", Some(cpu.present()));
    put("threads", Some(n_threads.to_string()));
    put("memory bytes", memory::total().map(|bytes| bytes.to_string()));
    put("device", Some(device_name(device)));
    put("gpu", gpu::model(device));
    let words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    put("command", Some(words.join(" ")));
    facts
}
