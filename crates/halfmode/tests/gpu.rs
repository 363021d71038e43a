//! What the program says of GPUs: in a build without the feature `cuda`, and with it where there is no driver.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::Folder;

const LINES: [&str; 3] =
    ["train tiny.toml --device cuda", "plan darcy --device cuda:1", "--device cuda bench step darcy"];

#[cfg(not(feature = "cuda"))]
#[test]
fn this_build_has_no_gpu() {
    let folder = Folder::tiny("cuda");
    for line in LINES {
        folder.run(line).exits(6).says(&["no GPU backend", "help: halfmode doctor"]);
    }
    let object = folder.run("train tiny.toml --device cuda --json").exits(6).object();
    assert_eq!(object["error"]["code"], 6);
    common::has_keys(&object["error"], &["what", "where", "why", "help"]);
    assert!(folder.run("doctor --device cuda").ok().stdout.contains("no GPU backend"));
    assert_eq!(folder.json("doctor")["gpu"]["backend"], serde_json::Value::Null);
}

/// Where there is a driver, device tests say what it does.
#[cfg(feature = "cuda")]
#[test]
fn a_missing_driver_is_named() {
    let folder = Folder::tiny("cuda");
    let object = folder.json("doctor");
    assert_eq!(object["gpu"]["backend"], "cuda");
    let libraries = object["gpu"]["libraries"].as_array().unwrap();
    let names: Vec<&str> = libraries.iter().map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "libcuda.so.1",
            "libnvrtc-builtins.so.13.0",
            "libnvrtc.so.13",
            "libcublasLt.so.13",
            "libcufft.so.12",
            "cuda_fp16.h"
        ]
    );
    for it in libraries {
        assert_ne!(it["path"].is_null(), it["error"].is_null(), "{it}");
    }
    let text = folder.run("doctor").ok().stdout;
    names.iter().for_each(|it| assert!(text.contains(it), "no {it} in {text}"));
    folder.run("train tiny.toml --device cuda:4711").exits(6).says(&["cuda:4711 is not available", "--device"]);
    if !object["gpu"]["error"].is_null() {
        let driver = "libcuda.so.1 was not found; it is needed for every use of the GPU";
        assert!(object["gpu"]["error"].as_str().unwrap().starts_with(driver));
        assert!(text.contains("everything runs on the CPU"), "{text}");
        for line in LINES {
            folder.run(line).exits(6).says(&["is not available", driver, "at: --device", "help: halfmode doctor"]);
        }
        let object = folder.run("train tiny.toml --device cuda --json").exits(6).object();
        assert_eq!(object["error"]["code"], 6);
    }
    folder.run("train tiny.toml --device cpu --set train.epochs=1 --out run").ok();
}
