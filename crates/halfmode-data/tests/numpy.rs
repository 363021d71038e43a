//! `.npy` and `.npz` files: every type, both orders, damage of every kind.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test may stop at an error; values that must be the same bits are compared as such"
)]

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use halfmode_data::numpy::{NpzArray, npy_info, read_npy, write_npy, write_npz};
use halfmode_data::{ChannelLayout, Error, FieldPairs, NpzFile, NumpyType, read_pairs, write_pairs};
use halfmode_precision::Domain;
use ndarray::{ArrayD, Axis, IxDyn, ShapeBuilder};
use proptest::prelude::*;

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("halfmode-numpy-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.file(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn npy(descr: &str, fortran: bool, shape: &str, data: &[u8]) -> Vec<u8> {
    let fortran = if fortran { "True" } else { "False" };
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}");
    while (header.len() + 11) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn ramp(shape: &[usize]) -> ArrayD<f32> {
    let n: usize = shape.iter().product();
    ArrayD::from_shape_vec(IxDyn(shape), (0..n).map(|v| v as f32 / 3.0).collect()).unwrap()
}

#[test]
fn every_real_type_is_read() {
    let folder = Folder::new("types");
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("<f2", [0x3c00u16, 0xc100, 0x0001].iter().flat_map(|v| v.to_le_bytes()).collect()),
        ("<f4", [1f32, -2.5, 5.9604645e-8].iter().flat_map(|v| v.to_le_bytes()).collect()),
        ("<f8", [1f64, -2.5, 5.960_464_477_539_063e-8].iter().flat_map(|v| v.to_le_bytes()).collect()),
        (">f4", [1f32, -2.5, 5.9604645e-8].iter().flat_map(|v| v.to_be_bytes()).collect()),
        (">f2", [0x3c00u16, 0xc100, 0x0001].iter().flat_map(|v| v.to_be_bytes()).collect()),
    ];
    for (descr, data) in cases {
        let path = folder.write("a.npy", &npy(descr, false, "(3,)", &data));
        let got = read_npy::<f64>(&path).unwrap();
        assert_eq!(got.as_slice().unwrap(), [1.0, -2.5, 2f64.powi(-24)], "{descr}");
        assert_eq!(read_npy::<f32>(&path).unwrap().as_slice().unwrap()[1], -2.5);
    }
    let integers: Vec<(&str, Vec<u8>, [f64; 2])> = vec![
        ("|b1", vec![0, 1], [0.0, 1.0]),
        ("|u1", vec![3, 255], [3.0, 255.0]),
        ("|i1", vec![3, 255], [3.0, -1.0]),
        ("<i2", vec![1, 0, 255, 255], [1.0, -1.0]),
        ("<u2", vec![1, 0, 255, 255], [1.0, 65535.0]),
        (">i4", vec![0, 0, 1, 0, 255, 255, 255, 255], [256.0, -1.0]),
        ("<u4", vec![1, 0, 0, 0, 255, 255, 255, 255], [1.0, 4294967295.0]),
        ("<i8", [5i64, -7].iter().flat_map(|v| v.to_le_bytes()).collect(), [5.0, -7.0]),
        ("<u8", [5u64, 1 << 63].iter().flat_map(|v| v.to_le_bytes()).collect(), [5.0, 2f64.powi(63)]),
    ];
    for (descr, data, want) in integers {
        let path = folder.write("a.npy", &npy(descr, false, "(2,)", &data));
        assert_eq!(read_npy::<f64>(&path).unwrap().as_slice().unwrap(), want, "{descr}");
    }
}

#[test]
fn fortran_order_and_every_rank_are_read() {
    let folder = Folder::new("order");
    for shape in [vec![], vec![5], vec![2, 3], vec![2, 3, 4], vec![1, 2, 1, 3, 2, 2], vec![3, 0, 2]] {
        let array = ramp(&shape);
        let text = format!("({})", shape.iter().map(|n| format!("{n},")).collect::<String>());
        let c: Vec<u8> = array.iter().flat_map(|v| v.to_le_bytes()).collect();
        let transposed = array.t();
        let f: Vec<u8> = transposed.iter().flat_map(|v| v.to_le_bytes()).collect();
        for (fortran, data) in [(false, c), (true, f)] {
            let path = folder.write("a.npy", &npy("<f4", fortran, &text, &data));
            let got = read_npy::<f32>(&path).unwrap();
            assert_eq!(got, array);
            assert!(got.is_standard_layout());
            assert_eq!(npy_info(&path).unwrap().fortran_order, fortran);
        }
    }
}

#[test]
fn arrays_survive_a_round_trip() {
    let folder = Folder::new("round");
    let path = folder.file("a.npy");
    let array = ramp(&[3, 4, 5]);
    write_npy(&path, &array.view()).unwrap();
    assert_eq!(read_npy::<f32>(&path).unwrap(), array);
    let mut fortran = ArrayD::<f32>::zeros(IxDyn(&[3, 4, 5]).f());
    fortran.assign(&array);
    write_npy(&path, &fortran.view()).unwrap();
    assert_eq!(read_npy::<f32>(&path).unwrap(), array);
    let double = array.mapv(|v| f64::from(v) / 7.0);
    write_npy(&path, &double.view()).unwrap();
    assert_eq!(read_npy::<f64>(&path).unwrap(), double);
    assert_eq!(npy_info(&path).unwrap().dtype, NumpyType::F64);

    let path = folder.file("a.npz");
    write_npz(&path, &[("x", NpzArray::F32(array.view())), ("y", NpzArray::F64(double.view()))]).unwrap();
    let mut file = NpzFile::open(&path).unwrap();
    assert_eq!(file.keys(), ["x", "y"]);
    assert_eq!(file.info("y").unwrap().shape, [3, 4, 5]);
    assert_eq!(file.read::<f32>("x").unwrap(), array);
    assert_eq!(file.read::<f64>("y").unwrap(), double);
    // Nothing temporary is left.
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 2);
}

#[test]
fn compressed_archives_are_read() {
    let folder = Folder::new("deflate");
    let array = ramp(&[4, 5]);
    let data: Vec<u8> = array.iter().flat_map(|v| v.to_le_bytes()).collect();
    let path = folder.file("c.npz");
    let mut writer = zip::ZipWriter::new(fs::File::create(&path).unwrap());
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    writer.start_file("x.npy", options).unwrap();
    writer.write_all(&npy("<f4", false, "(4, 5)", &data)).unwrap();
    writer.finish().unwrap();
    let mut file = NpzFile::open(&path).unwrap();
    assert_eq!(file.read::<f32>("x").unwrap(), array);
}

#[test]
fn pairs_are_read_in_every_layout() {
    let folder = Folder::new("layout");
    let path = folder.file("a.npz");
    let (x, y) = (ramp(&[3, 2, 4, 5]), ramp(&[3, 1, 4, 5]));
    let want = FieldPairs::new(x.clone(), y.clone()).unwrap();
    write_pairs(&path, &want).unwrap();
    assert_eq!(read_pairs(&path, "x", "y", ChannelLayout::ChannelsFirst, Domain::Real).unwrap(), want);

    let last = |a: &ArrayD<f32>| a.clone().permuted_axes(vec![0, 2, 3, 1]);
    let (x_last, y_last) = (last(&x), last(&y));
    write_npz(&path, &[("in", NpzArray::F32(x_last.view())), ("out", NpzArray::F32(y_last.view()))]).unwrap();
    assert_eq!(read_pairs(&path, "in", "out", ChannelLayout::ChannelsLast, Domain::Real).unwrap(), want);

    let y_bare = y.index_axis(Axis(1), 0);
    write_npz(&path, &[("a", NpzArray::F32(y_bare.view())), ("b", NpzArray::F32(y_bare.view()))]).unwrap();
    let got = read_pairs(&path, "a", "b", ChannelLayout::NoChannels, Domain::Real).unwrap();
    assert_eq!(got.x(), &y);
    let error = read_pairs(&path, "a", "c", ChannelLayout::NoChannels, Domain::Real).unwrap_err();
    assert!(matches!(&error, Error::MissingKey { key, found, .. } if key == "c" && found == &["a", "b"]));
    assert!(error.to_string().contains("it has: `a`, `b`"), "{error}");
}

#[test]
fn damage_is_typed() {
    let folder = Folder::new("damage");
    let whole = npy("<f4", false, "(4,)", &[0; 16]);
    let path = folder.write("a.npy", &whole[..whole.len() - 3]);
    assert!(matches!(read_npy::<f32>(&path), Err(Error::Truncated { expected: 16, found: 13, .. })));
    // A terabyte is refused at once, by the length of the file.
    let path = folder.write("b.npy", &npy("<f4", false, "(250000000000,)", &[0; 16]));
    assert!(matches!(read_npy::<f32>(&path), Err(Error::Truncated { .. })));
    let path = folder.write("c.npy", &npy("<c32", false, "(2,)", &[0; 16]));
    let error = read_npy::<f32>(&path).unwrap_err();
    assert!(error.to_string().contains("`<c32`"), "{error}");
    assert!(matches!(read_npy::<f32>(Path::new("/nowhere/a.npy")), Err(Error::Io { .. })));
    assert!(matches!(NpzFile::open(&path), Err(Error::Archive { .. })));
    // A folder that does not exist cannot be written to.
    let gone = folder.file("gone").join("a.npy");
    assert!(matches!(write_npy(&gone, &ramp(&[2]).view()), Err(Error::Io { .. })));

    // A hostile size inside an archive, where no file length warns of it.
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    writer
        .start_file(
            "x.npy",
            zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored),
        )
        .unwrap();
    writer.write_all(&npy("<f8", false, "(100000000000,)", &[0; 16])).unwrap();
    let bytes = writer.finish().unwrap();
    let mut file = NpzFile::from_reader(bytes, Path::new("hostile")).unwrap();
    assert!(matches!(file.read::<f32>("x"), Err(Error::Truncated { found: 16, .. })));
}

#[test]
fn a_flipped_bit_in_an_archive_is_noticed() {
    let folder = Folder::new("flip");
    let path = folder.file("a.npz");
    write_npz(&path, &[("x", NpzArray::F32(ramp(&[100]).view()))]).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[300] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(NpzFile::open(&path).unwrap().read::<f32>("x").is_err());
}

fn sample_npz() -> Vec<u8> {
    let folder = Folder::new(&format!("sample-{:?}", std::thread::current().id()));
    let path = folder.file("a.npz");
    write_npz(&path, &[("x", NpzArray::F32(ramp(&[4, 5]).view()))]).unwrap();
    fs::read(&path).unwrap()
}

fn try_npz(bytes: Vec<u8>) {
    if let Ok(mut file) = NpzFile::from_reader(Cursor::new(bytes), Path::new("bytes")) {
        for key in file.keys() {
            let _ = file.info(&key);
            let _ = file.read::<f32>(&key);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), magic in any::<bool>()) {
        if magic && bytes.len() > 8 {
            bytes[..8].copy_from_slice(b"\x93NUMPY\x01\x00");
        }
        let folder = Folder::new("random");
        let path = folder.write("a.npy", &bytes);
        let _ = read_npy::<f32>(&path);
        try_npz(bytes);
    }

    #[test]
    fn random_headers_never_panic(text in "[{}()\\[\\]',: 0-9a-zA-Z<|]{0,80}", data in prop::collection::vec(any::<u8>(), 0..64)) {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.extend(data);
        let folder = Folder::new("headers");
        let _ = read_npy::<f64>(&folder.write("a.npy", &bytes));
    }

    #[test]
    fn random_shapes_never_panic(shape in prop::collection::vec(any::<u64>(), 0..5), zero in any::<bool>(), fortran in any::<bool>()) {
        let mut text: String = shape.iter().map(|n| format!("{n},")).collect();
        if zero {
            text.push_str("0,");
        }
        let bytes = npy("<f4", fortran, &format!("({text})"), &[0; 64]);
        let folder = Folder::new("shapes");
        let _ = read_npy::<f32>(&folder.write("a.npy", &bytes));
    }

    #[test]
    fn truncated_files_are_refused(keep in 0.0f64..1.0, flip in any::<prop::sample::Index>(), bit in 0u8..8) {
        let whole = npy("<f4", false, "(4, 5)", &[7; 80]);
        let part = &whole[..(whole.len() as f64 * keep) as usize];
        let folder = Folder::new("truncated");
        prop_assert!(read_npy::<f32>(&folder.write("a.npy", part)).is_err());
        let archive = sample_npz();
        try_npz(archive[..(archive.len() as f64 * keep) as usize].to_vec());
        let mut flipped = archive;
        let at = flip.index(flipped.len());
        flipped[at] ^= 1 << bit;
        try_npz(flipped);
    }
}

/// Axes of length 0 and 1 may have strides that no other axis could have.
#[test]
fn arrays_with_inserted_and_empty_axes_are_written() {
    let folder = Folder::new("strides");
    for shape in [&[0, 3][..], &[3, 0], &[2, 3], &[1, 1], &[4, 1, 2]] {
        for axis in 0..=shape.len() {
            let array = ArrayD::<f32>::from_shape_fn(IxDyn(shape), |index| index[0] as f32).insert_axis(Axis(axis));
            let path = folder.file("array.npy");
            write_npy(&path, &array.view()).unwrap();
            assert_eq!(halfmode_data::numpy::read_npy::<f32>(&path).unwrap(), array);
            let archive = folder.file("array.npz");
            write_npz(&archive, &[("a", NpzArray::F32(array.view()))]).unwrap();
            assert_eq!(NpzFile::open(&archive).unwrap().read::<f32>("a").unwrap(), array);
        }
    }
}

/// What numpy wrote: single and double, either order, either end first.
#[test]
fn complex_arrays_get_an_axis_of_parts() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/complex_training/arrays.npz");
    let mut file = NpzFile::open(&path).unwrap();
    for (name, kind) in [("c8", "cf32"), ("c16", "cf64"), ("big_endian", "cf32"), ("fortran", "cf32")] {
        let info = file.info(name).unwrap();
        assert_eq!((info.type_name().as_str(), info.domain), (kind, Domain::Complex));
        assert_eq!(info.shape, [2, 3, 4, 2]);
        assert_eq!(file.read::<f64>(name).unwrap(), file.read::<f64>(&format!("{name}_parts")).unwrap(), "{name}");
    }
    assert!(file.info("fortran").unwrap().fortran_order && file.info("big_endian").unwrap().big_endian);
}

#[test]
fn complex_pairs_are_read_in_every_layout_and_only_as_what_they_are() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/complex_training/arrays.npz");
    let read = |x: &str, y: &str, layout, domain| read_pairs(&path, x, y, layout, domain);
    let pairs = read("c8", "c8_parts", ChannelLayout::ChannelsFirst, Domain::Complex).unwrap();
    assert_eq!((pairs.c_in(), pairs.grid(), pairs.domain()), (3, &[4][..], Domain::Complex));
    assert_eq!(pairs.x(), pairs.y());
    assert_eq!(pairs.select(&[1]).unwrap().domain(), Domain::Complex);
    let last = read("c8", "c8", ChannelLayout::ChannelsLast, Domain::Complex).unwrap();
    assert_eq!((last.c_in(), last.grid()), (4, &[3][..]));
    assert_eq!(last.x()[[1, 3, 2, 1]], pairs.x()[[1, 2, 3, 1]]);
    let none = read("c8", "c8", ChannelLayout::NoChannels, Domain::Complex).unwrap();
    assert_eq!((none.c_in(), none.grid()), (1, &[3, 4][..]));
    let refused = read("c8", "c8", ChannelLayout::ChannelsFirst, Domain::Real);
    assert!(matches!(refused, Err(Error::Domain { domain: Domain::Real, .. })));
    let real = ArrayD::zeros(IxDyn(&[2, 1, 4]));
    assert!(matches!(FieldPairs::of(Domain::Complex, real.clone(), real), Err(Error::Domain { .. })));
}
