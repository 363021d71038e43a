//! `halfmode doctor`: what this machine and this build can do.

use crate::cli::environment::{Cpu, FEATURES};
use crate::cli::error::{CliError, Exit};
use crate::cli::{Context, gpu, memory, text};
use halfmode::tensor::uses_avx512;
use serde_json::json;

pub(crate) fn run(context: &Context) -> Result<Exit, CliError> {
    let cpu = Cpu::detect();
    let cache = context.data_cache();
    let (gpu, gpu_lines) = gpu::report();
    let object = json!({
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "debug_build": cfg!(debug_assertions),
        "cpu": {
            "model": cpu.model,
            "n_cores": cpu.n_cores,
            "features": cpu.features,
            "avx512_kernels": uses_avx512(),
        },
        "threads": context.n_threads(),
        "memory": { "total_bytes": memory::total(), "available_bytes": memory::available() },
        "data_cache": text::path(&cache),
        "gpu": gpu,
    });
    context.output.result(object, || {
        let unknown = || "unknown".to_owned();
        let mut lines = vec![
            format!(
                "halfmode   {} ({} build)",
                env!("CARGO_PKG_VERSION"),
                if cfg!(debug_assertions) { "debug" } else { "release" }
            ),
            format!("system     {} {}", std::env::consts::OS, std::env::consts::ARCH),
            format!("processor  {}", cpu.model.clone().unwrap_or_else(unknown)),
            format!("cores      {} (this run would use {} threads)", cpu.n_cores, context.n_threads()),
            format!(
                "memory     {} in all, {} available",
                memory::total().map_or_else(unknown, text::bytes),
                memory::available().map_or_else(unknown, text::bytes)
            ),
            format!("data cache {}", cache.display()),
            String::new(),
        ];
        for (name, what) in FEATURES {
            let has = match cpu.features.get(name).copied().flatten() {
                Some(true) => "yes",
                Some(false) => "no",
                None => "?",
            };
            lines.push(format!("  {name:<12} {has:<4} {what}"));
        }
        lines.push(String::new());
        let kernels = if uses_avx512() { "AVX-512 (HALFMODE_PORTABLE=1 turns them off)" } else { "portable" };
        lines.push(format!("kernels    {kernels}"));
        lines.extend(gpu_lines);
        lines.join("\n")
    })?;
    Ok(Exit::Done)
}
