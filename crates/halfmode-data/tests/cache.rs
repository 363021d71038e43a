//! The cache: hits, corruption, foreign files, folders that cannot be written.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test may stop at an error; values that must be the same bits are compared as such"
)]

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use halfmode_data::cache::cache_path;
use halfmode_data::{CacheOutcome, CacheWarning, DarcyConfig, generate, load_or_generate};

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("halfmode-cache-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_second_call_loads_the_same_bits() {
    let folder = Folder::new("hit");
    let config = DarcyConfig::new(3, 8, 1);
    let calls = AtomicUsize::new(0);
    let load = || {
        load_or_generate(&config, &folder.0, None, &|_, _| {
            calls.fetch_add(1, Ordering::Relaxed);
        })
        .unwrap()
    };
    let (first, outcome) = load();
    assert!(matches!(outcome, CacheOutcome::Stored { replaced: None, .. }));
    assert!(outcome.warning().is_none());
    assert_eq!(outcome.path(), cache_path(&config, &folder.0).unwrap());
    let (second, outcome) = load();
    assert!(matches!(outcome, CacheOutcome::Loaded { .. }));
    assert_eq!(first, second);
    assert_eq!(calls.load(Ordering::Relaxed), 3);
    assert_eq!(first, generate(&config, None, &|_, _| {}).unwrap());
    let other = cache_path(&DarcyConfig { seed: 2, ..config.clone() }, &folder.0).unwrap();
    assert_ne!(other, outcome.path());
}

#[test]
fn damaged_and_foreign_files_are_replaced() {
    let folder = Folder::new("damage");
    let config = DarcyConfig::new(2, 8, 1);
    let load = |config: &DarcyConfig| load_or_generate(config, &folder.0, None, &|_, _| {}).unwrap();
    let (want, outcome) = load(&config);
    let path = outcome.path().to_owned();
    let good = fs::read(&path).unwrap();

    // Half a file, noise, nothing: unreadable.
    for bytes in [&good[..good.len() / 2], b"noise".as_slice(), b""] {
        fs::write(&path, bytes).unwrap();
        let (got, outcome) = load(&config);
        assert_eq!(got, want);
        let CacheOutcome::Stored { replaced: Some(warning), .. } = &outcome else {
            panic!("{outcome:?}");
        };
        assert!(matches!(warning, CacheWarning::Unreadable(_)));
        assert!(outcome.warning().unwrap().contains("could not be read"));
        assert_eq!(fs::read(&path).unwrap(), good);
    }

    // The data of another configuration under this name: foreign.
    let (_, other) = load(&DarcyConfig { seed: 5, ..config.clone() });
    fs::copy(other.path(), &path).unwrap();
    let (got, outcome) = load(&config);
    assert_eq!(got, want);
    assert!(matches!(outcome, CacheOutcome::Stored { replaced: Some(CacheWarning::Foreign), .. }));

    // Arrays without our description: foreign.
    halfmode_data::write_pairs(&path, &want).unwrap();
    let (_, outcome) = load(&config);
    assert!(matches!(outcome, CacheOutcome::Stored { replaced: Some(CacheWarning::Foreign), .. }));

    // A valid archive with our description and other numbers: corrupt.
    let mut file = halfmode_data::NpzFile::open(&path).unwrap();
    let meta = file.read::<f32>("meta").unwrap().mapv(|v| v as u8);
    let mut x = want.x().clone();
    x[[0, 0, 0, 0]] += 1.0;
    use halfmode_data::numpy::{NpzArray, write_npz};
    write_npz(
        &path,
        &[("x", NpzArray::F32(x.view())), ("y", NpzArray::F32(want.y().view())), ("meta", NpzArray::U8(meta.view()))],
    )
    .unwrap();
    let (got, outcome) = load(&config);
    assert_eq!(got, want);
    assert!(matches!(outcome, CacheOutcome::Stored { replaced: Some(CacheWarning::Corrupt), .. }));
    assert!(matches!(load(&config).1, CacheOutcome::Loaded { .. }));
}

#[test]
fn a_folder_that_cannot_be_made_is_no_error() {
    let folder = Folder::new("blocked");
    fs::create_dir_all(&folder.0).unwrap();
    let file = folder.0.join("file");
    fs::write(&file, b"in the way").unwrap();
    let config = DarcyConfig::new(1, 8, 1);
    let (_, outcome) = load_or_generate(&config, &file.join("cache"), None, &|_, _| {}).unwrap();
    assert!(matches!(outcome, CacheOutcome::NotStored { .. }));
    assert!(outcome.warning().unwrap().contains("not cached"), "{:?}", outcome.warning());
    // A folder where the file should be.
    let path = cache_path(&config, &folder.0).unwrap();
    fs::create_dir_all(path.join("sub")).unwrap();
    let (_, outcome) = load_or_generate(&config, &folder.0, None, &|_, _| {}).unwrap();
    assert!(matches!(outcome, CacheOutcome::NotStored { replaced: Some(_), .. }));
}

#[test]
fn errors_of_the_generator_come_through() {
    let folder = Folder::new("error");
    let config = DarcyConfig::new(0, 8, 1);
    assert!(load_or_generate(&config, &folder.0, None, &|_, _| {}).is_err());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() })]

    /// Whatever stands in a cache file, the data are those of the generator.
    #[test]
    fn damaged_files_never_become_data(
        changes in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), 0u8..), 0..4),
        cut in proptest::option::of(proptest::prelude::any::<proptest::sample::Index>()),
    ) {
        let folder = Folder::new("fuzz");
        let config = DarcyConfig::new(1, 4, 1);
        let (want, _) = load_or_generate(&config, &folder.0, None, &|_, _| {}).unwrap();
        let path = cache_path(&config, &folder.0).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&path, &bytes).unwrap();
        let (got, _) = load_or_generate(&config, &folder.0, None, &|_, _| {}).unwrap();
        proptest::prop_assert_eq!(got, want);
    }
}
