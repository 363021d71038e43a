//! Safetensors files: exact round trips, agreement with the reference library, hostile input.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use half::{bf16, f16};
use halfmode_nn::{Init, ParamSpec, Params};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::Device;
use halfmode_train::{Array, Corruption, Entry, Error, Values, load_parameters, read_named, write_named};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// A file of its own per call, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = format!("halfmode-checkpoint-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        Scratch(std::env::temp_dir().join(name))
    }

    fn with(bytes: &[u8]) -> Self {
        let scratch = Scratch::new();
        std::fs::write(&scratch.0, bytes).unwrap();
        scratch
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn sample() -> Vec<Entry<'static>> {
    vec![
        Entry::values("half", &[3], Values::F16([1.0, -0.5, 6e-8].map(f16::from_f32).to_vec())),
        Entry::values("brain", &[1, 1], Values::Bf16(vec![bf16::from_f32(3e38)])),
        Entry::values("single", &[2, 2], Values::F32(vec![0.1, f32::MIN_POSITIVE / 8.0, -0.0, f32::MAX])),
        Entry::values("double", &[], Values::F64(vec![std::f64::consts::PI])),
        Entry::values("empty", &[0, 7], Values::F32(vec![])),
    ]
}

fn sample_file() -> Vec<u8> {
    let file = Scratch::new();
    write_named(&file.0, &sample(), &json!({ "format_version": 1, "config": { "x": 0.1 } })).unwrap();
    std::fs::read(&file.0).unwrap()
}

/// A file with this header and this many bytes of data.
fn with_header(header: &str, n_data: usize) -> Scratch {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + n_data, 0);
    Scratch::with(&bytes)
}

#[test]
fn all_precisions_come_back_bit_for_bit() {
    let file = Scratch::with(&sample_file());
    let (arrays, metadata) = read_named(&file.0).unwrap();
    assert_eq!(metadata, json!({ "format_version": 1, "config": { "x": 0.1 } }));
    assert_eq!(arrays.len(), 5);
    let half = Values::F16([1.0, -0.5, 6e-8].map(f16::from_f32).to_vec());
    assert_eq!(arrays["half"], Array { shape: vec![3], values: half });
    let Values::F32(single) = &arrays["single"].values else { panic!() };
    let bits: Vec<u32> = single.iter().map(|v| v.to_bits()).collect();
    assert_eq!(bits, [0.1, f32::MIN_POSITIVE / 8.0, -0.0, f32::MAX].map(f32::to_bits));
    assert_eq!(arrays["double"].to_f64(), [std::f64::consts::PI]);
    assert_eq!(arrays["brain"].shape, [1, 1]);
    assert_eq!(arrays["empty"].shape, [0, 7]);
}

#[test]
fn the_reference_library_reads_what_is_written() {
    let bytes = sample_file();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 5);
    let single = file.tensor("single").unwrap();
    assert_eq!((single.dtype(), single.shape()), (safetensors::Dtype::F32, [2usize, 2].as_slice()));
    assert_eq!(single.data()[..4], 0.1f32.to_le_bytes());
    assert_eq!(bytes, sample_file(), "the same contents gave other bytes");
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0, "tensors are not aligned");
}

#[test]
fn complex_weights_are_read_in_both_forms() {
    let header = r#"{"w":{"dtype":"C64","shape":[2,1],"data_offsets":[0,16]}}"#;
    let (arrays, metadata) = read_named(&with_header(header, 16).0).unwrap();
    assert_eq!((&arrays["w"].shape, &metadata), (&vec![2, 1, 2], &Value::Null));
    let device = Device::cpu(1).unwrap();
    let specs = vec![ParamSpec::spectral("w", &[2, 1], Init::Ones)];
    let mut params = Params::new(&device, specs, &PrecisionPolicy::full(), 0).unwrap();
    load_parameters(&mut params, &arrays).unwrap();
    assert_eq!(params.list[0].file_values().unwrap(), [0.0; 4]);
}

#[test]
fn parameters_come_back_in_any_precision() {
    let device = Device::cpu(1).unwrap();
    let specs = || {
        let init = Init::Normal { std: 1.0 };
        vec![ParamSpec::spectral("a.weight.tensor", &[2, 3, 4, 3], init), ParamSpec::real("b", &[7], init)]
    };
    let policy = PrecisionPolicy::mixed(Precision::F16);
    let params = Params::new(&device, specs(), &policy, 5).unwrap();
    let file = Scratch::new();
    write_named(&file.0, &Entry::parameters(&params).unwrap(), &json!({})).unwrap();
    let (arrays, _) = read_named(&file.0).unwrap();
    assert_eq!(arrays["a.weight.tensor"].shape, [2, 3, 4, 3, 2]);
    assert_eq!(arrays["a.weight.tensor"].to_f64(), params.list[0].file_values().unwrap());
    for policy in [policy, PrecisionPolicy::double(), PrecisionPolicy::mixed(Precision::Bf16)] {
        let mut loaded = Params::new(&device, specs(), &policy, 6).unwrap();
        load_parameters(&mut loaded, &arrays).unwrap();
        for (got, want) in loaded.list.iter().zip(&params.list) {
            assert_eq!(got.file_values().unwrap(), want.file_values().unwrap());
        }
    }

    let mut other =
        Params::new(&device, vec![ParamSpec::real("c", &[7], Init::Ones)], &PrecisionPolicy::full(), 0).unwrap();
    assert!(matches!(load_parameters(&mut other, &arrays), Err(Error::MissingTensor { name }) if name == "c"));
    other.list[0].spec.name = "b".to_owned();
    other.list[0].spec.file_shape = vec![7, 1];
    let err = load_parameters(&mut other, &arrays).unwrap_err();
    assert_eq!(err.to_string(), "tensor `b` has shape [7], expected [7, 1]");
}

#[test]
fn what_cannot_be_written_is_refused_and_keeps_the_old_file() {
    let file = Scratch::with(b"old");
    let one = || Entry::values("x", &[1], Values::F32(vec![1.0]));
    let refused = |entries: &[Entry<'_>]| write_named(&file.0, entries, &Value::Null).unwrap_err();
    assert!(matches!(refused(&[one(), one()]), Error::TensorName { name } if name == "x"));
    assert!(matches!(refused(&[one().renamed("__metadata__")]), Error::TensorName { .. }));
    let short = Entry::values("y", &[2], Values::F32(vec![1.0]));
    assert!(matches!(refused(&[short]), Error::Length { expected: 2, found: 1, .. }));
    let huge = Entry::values("y", &[usize::MAX, 2], Values::F32(vec![1.0]));
    assert!(matches!(refused(&[huge]), Error::Length { .. }));
    assert_eq!(std::fs::read(&file.0).unwrap(), b"old");
    assert!(write_named(file.0.join("no/folder"), &[one()], &Value::Null).is_err());
}

#[test]
fn every_turned_bit_of_the_data_is_noticed() {
    let bytes = sample_file();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert!(start < bytes.len());
    for at in start..bytes.len() {
        let mut turned = bytes.clone();
        turned[at] ^= 1 << (at % 8);
        let outcome = read_named(&Scratch::with(&turned).0);
        assert!(matches!(outcome, Err(Error::Corrupt { reason: Corruption::Checksum, .. })), "byte {at}");
    }
    // So is a digit of the metadata.
    let mut turned = bytes.clone();
    let digit = bytes.windows(3).position(|part| part == b"0.1").unwrap() + 2;
    turned[digit] = b'2';
    let outcome = read_named(&Scratch::with(&turned).0);
    assert!(matches!(outcome, Err(Error::Corrupt { reason: Corruption::Checksum, .. })), "{outcome:?}");
}

#[test]
fn hostile_headers_are_typed_errors() {
    let corruption = |file: &Scratch| match read_named(&file.0) {
        Err(Error::Corrupt { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert!(matches!(corruption(&Scratch::with(b"")), Corruption::TooShort { bytes: 0 }));
    // A header of nearly 2^64 bytes, and one that is longer than the file.
    for length in [u64::MAX, 1 << 62, 100] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        assert!(matches!(corruption(&Scratch::with(&bytes)), Corruption::HeaderLength { .. }));
    }
    for (header, n_data) in [
        ("not json", 0),
        ("[]", 0),
        (r#"{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#, 4),
        (r#"{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4),
        (r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4),
        (r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4),
        (r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8),
        (r#"{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#, 0),
        (r#"{"x":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}}"#, 0),
    ] {
        assert!(matches!(corruption(&with_header(header, n_data)), Corruption::Header(_)), "{header}");
    }
    // 4 TiB that are not there.
    let header = r#"{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}"#;
    assert!(matches!(corruption(&with_header(header, 8)), Corruption::DataLength { .. }));
    let header = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    assert!(matches!(corruption(&with_header(header, 5)), Corruption::DataLength { expected: 4, found: 5 }));
    let header = r#"{"__metadata__":{"halfmode":"{"}}"#;
    assert!(matches!(corruption(&with_header(header, 0)), Corruption::Metadata(_)));

    let header = r#"{"x":{"dtype":"U64","shape":[1],"data_offsets":[0,8]}}"#;
    assert!(matches!(read_named(&with_header(header, 8).0), Err(Error::DType { name, .. }) if name == "x"));
    assert!(matches!(read_named(std::env::temp_dir()), Err(Error::Io { action: "read", .. })));
    assert!(matches!(read_named("/no/such/file"), Err(Error::Io { action: "read", .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_named(&Scratch::with(&bytes).0);
    }

    #[test]
    fn truncations_are_errors(cut in 0usize..10_000) {
        let bytes = sample_file();
        let cut = cut % bytes.len();
        prop_assert!(read_named(&Scratch::with(&bytes[..cut]).0).is_err());
    }

    #[test]
    fn changed_bytes_never_panic(changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..4)) {
        let mut bytes = sample_file();
        let len = bytes.len();
        for (at, value) in changes {
            bytes[at % len] = value;
        }
        let _ = read_named(&Scratch::with(&bytes).0);
    }

    #[test]
    fn changed_headers_never_panic(at in any::<usize>(), text in "[0-9\\[\\]{}\",:eE.-]{0,6}", n_data in 0usize..40) {
        let header = r#"{"x":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"y":{"dtype":"F16","shape":[3],"data_offsets":[8,14]}}"#;
        let at = at % header.len();
        let header = format!("{}{text}{}", &header[..at], &header[(at + text.len()).min(header.len())..]);
        let _ = read_named(&with_header(&header, n_data).0);
    }
}
