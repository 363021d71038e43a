//! Labelled images: drawn, and read from the files of MNIST, CIFAR-10 and STL-10.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_data::{LabelledImages, drawn_shapes};
use std::path::{Path, PathBuf};

/// A folder that is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("halfmode-images-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn said(result: halfmode_data::Result<LabelledImages>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn idx_files_are_read_and_wrong_ones_refused() {
    let folder = Folder::new("idx");
    let header = |axes: &[u8]| {
        [&[0, 0, 8, axes.len() as u8][..], &axes.iter().flat_map(|n| [0, 0, 0, *n]).collect::<Vec<_>>()].concat()
    };
    let pixels: Vec<u8> = (0..2 * 4 * 5).collect();
    let images = folder.write("images", &[header(&[2, 4, 5]), pixels.clone()].concat());
    let labels = folder.write("labels", &[header(&[2]), vec![7, 0]].concat());
    let read = LabelledImages::read_idx(&images, &labels).unwrap();
    assert_eq!((read.len(), read.channels, read.extents, &read.labels[..]), (2, 1, [4, 5], &[7, 0][..]));
    assert_eq!(read.image(1), &pixels[20..]);
    assert_eq!(read.first(1).pixels, &pixels[..20]);
    let short = folder.write("short", &[header(&[2, 4, 5]), pixels[..39].to_vec()].concat());
    assert!(said(LabelledImages::read_idx(&short, &labels)).contains("[2, 4, 5], 39 bytes follow: it is truncated"));
    assert!(
        said(LabelledImages::read_idx(&labels, &labels))
            .contains("3 axes begins with [0, 0, 8, 3], this one with [0, 0, 8, 1]")
    );
    let one = folder.write("one", &[header(&[1]), vec![7]].concat());
    assert!(said(LabelledImages::read_idx(&images, &one)).contains("1 labels for 2 images"));
    let eleven = folder.write("eleven", &[header(&[2]), vec![7, 11]].concat());
    let told = said(LabelledImages::read_idx(&images, &eleven));
    assert!(told.contains("eleven`") && told.contains("label 1 is 11, labels count from 0 to 9"), "{told}");
    let packed = folder.write("packed.gz", &[0x1f, 0x8b, 8, 0]);
    assert!(said(LabelledImages::read_idx(&packed, &labels)).contains("gunzip"));
    let huge = folder.write("huge", &[&[0, 0, 8, 3][..], &[255; 12]].concat());
    assert!(said(LabelledImages::read_idx(&huge, &labels)).contains("truncated"));
    assert!(said(LabelledImages::read_idx(Path::new("/nowhere"), &labels)).contains("cannot open"));
    assert!(said(LabelledImages::read_idx(&folder.0, &labels)).contains("cannot open"));
}

#[test]
fn batches_of_cifar_are_read_one_after_another() {
    let folder = Folder::new("cifar");
    let record = |label: u8, first: u8| [&[label, first][..], &[9; 3071]].concat();
    let a = folder.write("a.bin", &[record(3, 1), record(9, 2)].concat());
    let b = folder.write("b.bin", &record(0, 3));
    let read = LabelledImages::read_cifar10(&[&a, &b]).unwrap();
    assert_eq!((&read.labels[..], read.extents, read.channels), (&[3, 9, 0][..], [32, 32], 3));
    assert_eq!([0, 1, 2].map(|idx| read.image(idx)[0]), [1, 2, 3]);
    let cut = folder.write("cut.bin", &record(0, 3)[..3000]);
    assert!(said(LabelledImages::read_cifar10(&[&cut])).contains("3000 bytes are no whole number of records of 3073"));
    let wrong = folder.write("wrong.bin", &record(10, 3));
    // The number is one of this file, not of all files before.
    let told = said(LabelledImages::read_cifar10(&[&a, &wrong]));
    assert!(told.contains("wrong.bin`") && told.contains("label 0 is 10,"), "{told}");
}

/// Columns become rows, and labels count from zero.
#[test]
fn stl_is_turned_the_right_way() {
    let folder = Folder::new("stl");
    let mut image = vec![0; 3 * 96 * 96];
    // Colour 1, column 2, row 5.
    image[96 * 96 + 2 * 96 + 5] = 200;
    let (images, labels) = (folder.write("x.bin", &image), folder.write("y.bin", &[10]));
    let read = LabelledImages::read_stl10(&images, &labels).unwrap();
    assert_eq!((read.image(0)[96 * 96 + 5 * 96 + 2], read.labels[0]), (200, 9));
    assert!(
        said(LabelledImages::read_stl10(&images, &folder.write("y0.bin", &[0]))).contains("labels count from 1 to 10")
    );
    let told = said(LabelledImages::read_stl10(&images, &folder.write("y11.bin", &[11])));
    assert!(told.contains("y11.bin`") && told.contains("label 0 is 11,"), "{told}");
    assert!(
        said(LabelledImages::read_stl10(&images, &folder.write("y2.bin", &[1, 2]))).contains("2 labels for 1 images")
    );
    assert!(said(LabelledImages::read_stl10(&labels, &labels)).contains("no whole number of images"));
}

/// Shapes differ from one another more than from themselves: the mean images of classes are apart.
#[test]
fn drawn_shapes_are_the_same_everywhere_and_differ_by_class() {
    let images = drawn_shapes(3, 16, 0, 8000);
    assert_eq!(images.image(799), drawn_shapes(3, 16, 799, 1).image(0));
    assert_ne!(images.image(0), drawn_shapes(4, 16, 0, 1).image(0));
    // What is bright or dark against the border, whichever it is.
    let mut means = vec![vec![0.0; 256]; 8];
    for idx in 0..images.len() {
        let image = images.image(idx);
        let border = (image[..16].iter().chain(&image[240..]).map(|&it| f64::from(it)).sum::<f64>()) / 32.0;
        let scaled = image.iter().map(|&it| (f64::from(it) - border).abs() / 100.0);
        means[images.labels[idx]].iter_mut().zip(scaled).for_each(|(mean, it)| *mean += it);
    }
    for (a, b) in (0..8).flat_map(|a| (0..a).map(move |b| (a, b))) {
        let off = means[a].iter().zip(&means[b]).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        // The noise, 0.2, of two sums of a thousand images at 256 points makes 0.2 sqrt(2 · 1000 · 256) = 143.
        assert!(off > 2.0 * 143.0, "{} and {}: {off}", images.names[a], images.names[b]);
    }
}
