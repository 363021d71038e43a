//! Labelled images: what is in the files of MNIST, CIFAR-10 and STL-10.

use crate::regular_file::open_regular;
use crate::{Error, Result};
use std::io::Read as _;
use std::path::Path;

/// Images of one size with a class each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledImages {
    /// Colours: 1 or 3.
    pub channels: usize,
    /// Rows and columns.
    pub extents: [usize; 2],
    /// Bytes, `[n, channels, rows, columns]`.
    pub pixels: Vec<u8>,
    /// The class of each image, from 0.
    pub labels: Vec<usize>,
    /// What the classes are called.
    pub names: Vec<String>,
}

/// Names of ten digits.
fn digits() -> Vec<String> {
    (0..10).map(|digit| digit.to_string()).collect()
}

fn named(names: [&str; 10]) -> Vec<String> {
    names.map(str::to_owned).to_vec()
}

/// The largest file that is read: MNIST, CIFAR-10 and STL-10's labelled files are all smaller.
const MAX_BYTES: u64 = 1 << 30;

fn bytes_of(path: &Path) -> Result<Vec<u8>> {
    let failed = |action| move |source| Error::Io { action, path: path.to_owned(), source };
    let file = open_regular(path).map_err(failed("open"))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed("read"))?;
    if bytes.len() as u64 > MAX_BYTES {
        return bad(path, format!("it has more than {MAX_BYTES} bytes: it is another sort of file"));
    }
    if bytes.starts_with(&[0x1f, 0x8b]) {
        return bad(path, "it is compressed: unpack it with `gunzip` first".to_owned());
    }
    Ok(bytes)
}

fn bad<T>(path: &Path, reason: String) -> Result<T> {
    Err(Error::Images { path: path.to_owned(), reason })
}

/// The extents and the data of an IDX file of bytes with `N` axes.
fn idx<'a, const N: usize>(path: &Path, bytes: &'a [u8]) -> Result<([usize; N], &'a [u8])> {
    let header = 4 + 4 * N;
    let expected = [0, 0, 8, N as u8];
    if bytes.len() < header || bytes[..4] != expected {
        let start = &bytes[..bytes.len().min(4)];
        return bad(
            path,
            format!("an IDX file of bytes with {N} axes begins with {expected:?}, this one with {start:?}"),
        );
    }
    let mut extents = [0; N];
    for (extent, bytes) in extents.iter_mut().zip(bytes[4..].chunks_exact(4)) {
        *extent = bytes.iter().fold(0, |n, byte| n << 8 | usize::from(*byte));
    }
    let needs = extents.iter().try_fold(1usize, |n, extent| n.checked_mul(*extent));
    let found = bytes.len() - header;
    if needs != Some(found) {
        return bad(path, format!("its header says {extents:?}, {found} bytes follow: it is truncated or damaged"));
    }
    Ok((extents, &bytes[header..]))
}

/// The classes of the labels of a file, which count from `first` to `first + 9`.
fn classes(path: &Path, labels: impl Iterator<Item = u8>, first: u8) -> Result<Vec<usize>> {
    let class = |(idx, label): (usize, u8)| match label.checked_sub(first) {
        Some(class) if class < 10 => Ok(usize::from(class)),
        _ => bad(path, format!("label {idx} is {label}, labels count from {first} to {}", first + 9)),
    };
    labels.enumerate().map(class).collect()
}

impl LabelledImages {
    /// Number of images.
    #[must_use]
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The bytes of one image.
    #[must_use]
    pub fn image(&self, idx: usize) -> &[u8] {
        let len = self.channels * self.extents[0] * self.extents[1];
        self.pixels.get(idx * len..(idx + 1) * len).unwrap_or_default()
    }

    /// The first `n` images; all, if there are fewer.
    #[must_use]
    pub fn first(mut self, n: usize) -> Self {
        let n = n.min(self.len());
        self.pixels.truncate(n * self.channels * self.extents[0] * self.extents[1]);
        self.labels.truncate(n);
        self
    }

    fn checked(self, path: &Path) -> Result<Self> {
        if self.is_empty() {
            return bad(path, "it holds no image".to_owned());
        }
        if self.extents.iter().any(|extent| !(4..=1024).contains(extent)) {
            return bad(
                path,
                format!("images of {} x {} points: 4 to 1024 are possible", self.extents[0], self.extents[1]),
            );
        }
        Ok(self)
    }

    /// MNIST and what is stored like it: an IDX file of images and one of labels.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Images`] for a file of another kind, a truncated one, and counts that disagree.
    pub fn read_idx(images: &Path, labels: &Path) -> Result<Self> {
        let (of_images, of_labels) = (bytes_of(images)?, bytes_of(labels)?);
        let ([n, rows, columns], pixels) = idx::<3>(images, &of_images)?;
        let ([n_labels], of_labels) = idx::<1>(labels, &of_labels)?;
        if n != n_labels {
            return bad(labels, format!("it has {n_labels} labels for {n} images"));
        }
        let labels = classes(labels, of_labels.iter().copied(), 0)?;
        let read =
            LabelledImages { channels: 1, extents: [rows, columns], pixels: pixels.to_vec(), labels, names: digits() };
        read.checked(images)
    }

    /// CIFAR-10's binary batches, one after another: a label, then the three colours of 32 x 32 points, row by row.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Images`] for a truncated file and labels that are none.
    pub fn read_cifar10(paths: &[&Path]) -> Result<Self> {
        const IMAGE: usize = 3 * 32 * 32;
        let names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
        let (pixels, labels) = (Vec::new(), Vec::new());
        let mut read = LabelledImages { channels: 3, extents: [32, 32], pixels, labels, names: named(names) };
        for path in paths {
            let bytes = bytes_of(path)?;
            if bytes.is_empty() || !bytes.len().is_multiple_of(IMAGE + 1) {
                return bad(path, format!("{} bytes are no whole number of records of {}", bytes.len(), IMAGE + 1));
            }
            let records = bytes.chunks_exact(IMAGE + 1);
            read.labels.extend(classes(path, records.clone().map(|record| record[0]), 0)?);
            records.for_each(|record| read.pixels.extend_from_slice(&record[1..]));
        }
        Ok(read)
    }

    /// STL-10's binary files: three colours of 96 x 96 points, column by column; labels from 1.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Images`] for a truncated file, counts that disagree, and labels that are none.
    pub fn read_stl10(images: &Path, labels: &Path) -> Result<Self> {
        const SIDE: usize = 96;
        let (stored, of_labels) = (bytes_of(images)?, bytes_of(labels)?);
        if stored.is_empty() || !stored.len().is_multiple_of(3 * SIDE * SIDE) {
            let record = 3 * SIDE * SIDE;
            return bad(images, format!("{} bytes are no whole number of images of {record}", stored.len()));
        }
        let n = stored.len() / (3 * SIDE * SIDE);
        if of_labels.len() != n {
            return bad(labels, format!("it has {} labels for {n} images", of_labels.len()));
        }
        let labels = classes(labels, of_labels.into_iter(), 1)?;
        let mut pixels = vec![0; stored.len()];
        for (to, from) in pixels.chunks_exact_mut(SIDE * SIDE).zip(stored.chunks_exact(SIDE * SIDE)) {
            for (at, to) in to.iter_mut().enumerate() {
                *to = from[at % SIDE * SIDE + at / SIDE];
            }
        }
        let names = named(["plane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]);
        LabelledImages { channels: 3, extents: [SIDE; 2], pixels, labels, names }.checked(images)
    }
}
