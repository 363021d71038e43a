//! HDF5 files of h5py, MATLAB's and NetCDF's, recorded by `tests/golden/hdf5/make.py`, whole and damaged.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

use halfmode_data::{Error, Hdf5File, NumpyType};
use ndarray::{Array3, ArrayD, Axis, IxDyn, s};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/hdf5").join(name)
}

fn open(name: &str) -> Hdf5File {
    Hdf5File::open(&recorded(name)).unwrap().unwrap()
}

/// The array that the recorded ones are made of.
fn base() -> Array3<f64> {
    Array3::from_shape_fn((2, 3, 4), |(i, j, k)| (12 * i + 4 * j + k) as f64 / 4.0)
}

/// Real and imaginary parts on a last axis.
fn pairs(real: &ArrayD<f64>, imaginary: &ArrayD<f64>) -> ArrayD<f64> {
    ndarray::stack(Axis(real.ndim()), &[real.view(), imaginary.view()]).unwrap()
}

fn vector(values: &[f64]) -> ArrayD<f64> {
    ArrayD::from_shape_vec(IxDyn(&[values.len()]), values.to_vec()).unwrap()
}

#[test]
fn every_data_set_of_h5py() {
    let whole = base().into_dyn();
    let third = &whole / 3.0;
    let mut filled = ArrayD::from_elem(IxDyn(&[5, 2]), 2.5);
    filled[[4, 1]] = 7.0;
    let empty = ArrayD::zeros(IxDyn(&[0, 3]));
    let want = [
        ("big_f64", NumpyType::F64, third.clone()),
        ("big_i16", NumpyType::I16, vector(&[1.0, -2.0, 300.0])),
        ("bool", NumpyType::Bool, whole.mapv(|value| f64::from(u8::from(value > 2.0)))),
        ("c128", NumpyType::F64, pairs(&third, &whole.mapv(|_| 1.0))),
        ("c64", NumpyType::F32, pairs(&whole, &(-2.0 * &whole))),
        ("empty", NumpyType::F64, empty),
        ("f16", NumpyType::F16, whole.clone()),
        ("f32", NumpyType::F32, whole.clone()),
        ("f64", NumpyType::F64, third),
        ("filled", NumpyType::F32, filled),
        ("i64", NumpyType::I64, vector(&[1.0, -2.0, 2f64.powi(40)])),
        ("scalar", NumpyType::F64, ArrayD::from_elem(IxDyn(&[]), 2.5)),
        ("u8", NumpyType::U8, vector(&[0.0, 200.0])),
        ("chunks/checked", NumpyType::F64, whole.clone()),
        ("chunks/grows", NumpyType::F64, whole.clone()),
        ("chunks/gzip", NumpyType::F64, whole.clone()),
        ("chunks/lzf", NumpyType::F64, whole.clone()),
        ("chunks/plain", NumpyType::F64, whole.clone()),
        ("chunks/repeated", NumpyType::I64, vector(&(0..1000).map(|i| f64::from(i % 7)).collect::<Vec<_>>())),
        ("group/inner/f32", NumpyType::F32, whole.index_axis(Axis(0), 0).to_owned()),
    ];
    for name in ["small.h5", "latest.h5"] {
        let file = open(name);
        assert_eq!(file.keys(), want.iter().map(|(key, ..)| *key).collect::<Vec<_>>(), "{name}");
        for (key, dtype, values) in &want {
            let info = file.info(key).unwrap();
            assert_eq!((info.dtype, info.shape.as_slice()), (*dtype, values.shape()), "{name} {key}");
            assert_eq!(info.complex, key.starts_with('c') && !key.contains('/'), "{name} {key}");
            assert_eq!(file.read::<f64>(key).unwrap(), values, "{name} {key}");
            assert_eq!(file.read::<f32>(key).unwrap(), values.mapv(|value| value as f32), "{name} {key}");
        }
        let left_out: Vec<&str> = file.left_out().iter().map(|it| it.name.as_str()).collect();
        assert_eq!(left_out, ["bfloat", "bytes", "nothing", "record", "text", "texts"], "{name}");
        assert_eq!(file.left_out()[0].reason, "floats with 8 bits of exponent and 7 of mantissa");
        assert_eq!(file.left_out()[3].reason, "records with fields a, b");
        let err = file.read::<f32>("text").unwrap_err();
        assert!(matches!(&err, Error::MissingKey { key, .. } if key == "text"), "{err}");
    }
    assert_eq!(open("block.h5").read::<f64>("f64").unwrap(), &whole / 3.0);
}

#[test]
fn axes_of_matlab_are_as_it_shows_them() {
    let (file, base) = (open("v73.mat"), base());
    assert_eq!(file.keys(), ["a", "flag", "u", "z"]);
    assert_eq!(file.read::<f64>("a").unwrap(), base.clone().into_dyn());
    assert_eq!(file.read::<f64>("u").unwrap(), base.slice(s![.., .., 0]).into_dyn());
    let (real, imaginary) = (base.slice(s![.., .., 1]).into_dyn(), base.slice(s![.., .., 2]).into_dyn());
    let z = pairs(&real.to_owned(), &imaginary.mapv(|value| -value));
    assert_eq!((file.info("z").unwrap().shape, file.read::<f64>("z").unwrap()), (vec![2, 3, 2], z));
    let flag = file.info("flag").unwrap();
    assert_eq!((flag.dtype, flag.shape), (NumpyType::Bool, vec![1, 3]));
    let left_out: Vec<&str> = file.left_out().iter().map(|it| it.name.as_str()).collect();
    assert_eq!(left_out, ["name", "none"]);
}

#[test]
fn variables_of_netcdf() {
    let (file, base) = (open("four.nc"), base());
    assert_eq!(file.keys(), ["u", "x"]);
    assert_eq!(file.read::<f64>("u").unwrap(), base.index_axis(Axis(0), 0).into_dyn());
    assert_eq!(file.left_out()[0].name, "t");
}

#[test]
fn other_files() {
    for name in ["v5.mat", "classic.nc", "make.py"] {
        assert!(Hdf5File::open(&recorded(name)).unwrap().is_none(), "{name}");
    }
    assert!(matches!(Hdf5File::open(&recorded("none.h5")), Err(Error::Io { .. })));
    let matlab = std::fs::read(recorded("v73.mat")).unwrap();
    let path = temporary("header", &matlab[..512]);
    let err = Hdf5File::open(&path).unwrap_err();
    assert!(err.to_string().contains("ends before its HDF5 data"), "{err}");
    std::fs::remove_file(path).unwrap();
}

/// A data set of 48 bytes that claims 2^60 elements.
#[test]
fn sizes_in_headers_are_not_believed() {
    let mut bytes = std::fs::read(recorded("block.h5")).unwrap();
    let shape: Vec<u8> = [2u64, 3, 4].iter().flat_map(|n| n.to_le_bytes()).collect();
    let places: Vec<usize> = (0..bytes.len() - 24).filter(|&at| bytes[at..at + 24] == shape).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at..at + 8].copy_from_slice(&(1u64 << 48).to_le_bytes());
    }
    let path = temporary("huge", &bytes);
    let file = Hdf5File::open(&path).unwrap().unwrap();
    assert_eq!(file.info("f64").unwrap().shape, [1 << 48, 3, 4]);
    let err = file.read::<f32>("f64").unwrap_err();
    assert!(matches!(&err, Error::Hdf5 { reason, .. } if reason.contains("read limit")), "{err}");
    std::fs::remove_file(path).unwrap();
}

fn temporary(name: &str, bytes: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("halfmode-hdf5-{name}-{}.h5", std::process::id()));
    std::fs::write(&path, bytes).unwrap();
    path
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever stands in a file, it is read or refused; what is read has the shape that was announced.
    #[test]
    fn damaged_files_are_errors(
        name in prop::sample::select(vec!["small.h5", "latest.h5", "block.h5", "v73.mat", "four.nc"]),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
    ) {
        let mut bytes = std::fs::read(recorded(name)).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len()));
        }
        let path = temporary("damaged", &bytes);
        if let Ok(Some(file)) = Hdf5File::open(&path) {
            for key in file.keys() {
                if let Ok(array) = file.read::<f32>(&key) {
                    prop_assert_eq!(array.shape(), &file.info(&key).unwrap().shape);
                }
            }
        }
        std::fs::remove_file(path).unwrap();
    }
}
