//! Files of `torch.save`, recorded by `tests/golden/torch/make.py`, whole and damaged.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

use halfmode_data::{Error, NumpyType, TorchFile};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn recorded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/torch/small.pt")
}

#[test]
fn every_tensor_of_a_file() {
    let mut file = TorchFile::open(&recorded()).unwrap().unwrap();
    let keys = ["x", "y", "turned", "row", "half", "wide", "long", "scalar", "nested.0.a", "7", "parameter", "empty"];
    assert_eq!(file.keys(), keys);
    let mut get = |name: &str| {
        let array = file.read::<f64>(name).unwrap();
        (array.shape().to_vec(), array.iter().copied().collect::<Vec<f64>>())
    };
    let base: Vec<f64> = (0..24).map(|i| f64::from(i) / 4.0).collect();
    assert_eq!(get("y"), (vec![2, 3, 4], base.clone()));
    assert_eq!(get("half").1, base);
    assert_eq!(get("x").1, base.iter().map(|&v| f64::from(u8::from(v > 2.0))).collect::<Vec<_>>());
    assert_eq!(get("wide").1, base.iter().map(|v| v / 3.0).collect::<Vec<_>>());
    let (shape, turned) = get("turned");
    assert_eq!(shape, [4, 2, 3]);
    assert!((0..24).all(|at| turned[at].to_bits() == base[at % 6 * 4 + at / 6].to_bits()));
    assert_eq!(get("row"), (vec![2, 4], base[16..24].to_vec()));
    assert_eq!(get("nested.0.a").1, base[..4]);
    assert_eq!(get("7").1, [base[0], base[4], base[8]]);
    assert_eq!(get("parameter"), (vec![3, 4], base[..12].to_vec()));
    assert_eq!(get("long").1, [1.0, -2.0, 2f64.powi(40)]);
    assert_eq!(get("scalar"), (vec![], vec![2.5]));
    assert_eq!(get("empty"), (vec![0, 3], vec![]));
    assert_eq!((file.info("x").unwrap().dtype, file.info("half").unwrap().dtype), (NumpyType::Bool, NumpyType::F16));
    let err = file.read::<f32>("z").unwrap_err();
    assert!(matches!(&err, Error::MissingKey { key, .. } if key == "z"), "{err}");
}

fn temporary(name: &str, bytes: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("halfmode-torch-{name}-{}.pt", std::process::id()));
    std::fs::write(&path, bytes).unwrap();
    path
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever stands in a file, it is read or refused.
    #[test]
    fn damaged_files_are_errors(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), cuts in any::<bool>()) {
        let mut bytes = std::fs::read(recorded()).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len()));
        }
        let path = temporary("damaged", &bytes);
        if let Ok(Some(mut file)) = TorchFile::open(&path) {
            for key in file.keys() {
                let _ = file.read::<f32>(&key);
            }
        }
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn other_archives_and_other_files() {
    let numpy = std::env::temp_dir().join(format!("halfmode-torch-{}.npz", std::process::id()));
    halfmode_data::numpy::write_npz(&numpy, &[]).unwrap();
    assert!(TorchFile::open(&numpy).unwrap().is_none());
    std::fs::remove_file(numpy).unwrap();
    let path = temporary("other", b"not an archive");
    assert!(matches!(TorchFile::open(&path), Err(Error::Torch { .. })));
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(TorchFile::open(&path), Err(Error::Io { .. })));
}
