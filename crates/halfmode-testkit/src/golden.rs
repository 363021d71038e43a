//! Recorded outputs and gradients of the peers.

use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// One recorded case: every array in double precision, by name.
#[derive(Clone, Debug)]
pub struct Golden {
    arrays: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    facts: BTreeMap<String, Value>,
}

/// `tests/golden` of the workspace: where it was when this was compiled, or where a copied program finds it in the
/// current folder or above.
fn root() -> PathBuf {
    let compiled = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden"));
    let here = std::env::current_dir().unwrap_or_default();
    let mut near = here.ancestors().map(|it| it.join("tests/golden"));
    if compiled.is_dir() { compiled } else { near.find(|it| it.is_dir()).unwrap_or(compiled) }
}

fn halves<T: Into<f64>>(data: &[u8], read: impl Fn([u8; 2]) -> T) -> Vec<f64> {
    data.chunks_exact(2).map(|b| read(b.try_into().unwrap()).into()).collect()
}

impl Golden {
    /// Reads `tests/golden/NAME.safetensors` of the workspace; integers in it are left out.
    ///
    /// # Panics
    /// If the file is missing or not what it should be.
    #[must_use]
    pub fn load(name: &str) -> Self {
        let path = root().join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        // Counters are no values.
        let tensors = file.tensors().into_iter().filter(|(_, tensor)| tensor.dtype() != safetensors::Dtype::I64);
        let arrays = tensors.map(|(name, tensor)| {
            let data = tensor.data();
            let values = match tensor.dtype() {
                safetensors::Dtype::F64 => {
                    data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
                }
                safetensors::Dtype::F32 => {
                    data.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
                }
                safetensors::Dtype::F16 => halves(data, half::f16::from_le_bytes),
                safetensors::Dtype::BF16 => halves(data, half::bf16::from_le_bytes),
                other => panic!("{name}: {other:?} is not expected in a golden file"),
            };
            (name, (tensor.shape().to_vec(), values))
        });
        let arrays = arrays.collect();
        // Facts about a case stand in the file, or for cases of the acceptance set in a list of them all.
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let list = std::fs::read(root().join("manifest.json")).unwrap();
        let mut list: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_slice(&list).unwrap();
        let mut facts = list.remove(name).unwrap_or_default();
        for (key, text) in header.metadata().iter().flatten() {
            facts.insert(key.clone(), serde_json::from_str(text).unwrap_or_else(|_| Value::from(text.as_str())));
        }
        Golden { arrays, facts }
    }

    /// Names of the cases in a folder of `tests/golden`, in order.
    ///
    /// # Panics
    /// If there is no such folder.
    #[must_use]
    pub fn list(folder: &str) -> Vec<String> {
        let files = std::fs::read_dir(root().join(folder)).unwrap();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> =
            names.filter_map(|name| Some(format!("{folder}/{}", name.strip_suffix(".safetensors")?))).collect();
        names.sort();
        names
    }

    /// What is recorded about the case under `key`, such as `config`; null if nothing is.
    #[must_use]
    pub fn fact(&self, key: &str) -> &Value {
        self.facts.get(key).unwrap_or(&Value::Null)
    }

    /// What single precision may be off by in `what`, `out` or `grad_max`: four times the peer's own error,
    /// at least 1e-6.
    ///
    /// # Panics
    /// If no error of the peer is recorded.
    #[must_use]
    pub fn f32_tolerance(&self, what: &str) -> f64 {
        let error = &self.fact("f32_rel_err")[what];
        (4.0 * error.as_f64().unwrap_or_else(|| panic!("no error of the peer's `{what}`"))).max(1e-6)
    }

    /// Asserts that named gradients agree with those recorded under `prefix` to `tolerance`: a relative
    /// 2-norm error whose denominator is at least 1e-4 of the largest gradient's norm, so that gradients that
    /// are zero up to rounding do not count.
    ///
    /// # Panics
    /// If a gradient is further off, missing, or of another length.
    pub fn assert_gradients(&self, case: &str, prefix: &str, got: &[(String, Vec<f64>)], tolerance: f64) {
        let norm = |values: &[f64]| values.iter().map(|it| it * it).sum::<f64>().sqrt();
        let largest = self.names(prefix).map(|name| norm(self.get(&format!("{prefix}{name}")).1)).fold(0.0, f64::max);
        assert_eq!(self.names(prefix).count(), got.len(), "{case}: numbers of gradients");
        for (name, got) in got {
            let (_, want) = self.get(&format!("{prefix}{name}"));
            assert_eq!(got.len(), want.len(), "{case}: grad {name}");
            let off: Vec<f64> = got.iter().zip(want).map(|(got, want)| got - want).collect();
            let error = norm(&off) / norm(want).max(1e-4 * largest);
            assert!(error <= tolerance, "{case}: grad {name} is off by {error:.2e}, at most {tolerance:.2e}");
        }
    }

    /// Shape and values of one array.
    ///
    /// # Panics
    /// If there is none of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> (&[usize], &[f64]) {
        let (shape, values) = self.arrays.get(name).unwrap_or_else(|| panic!("no array `{name}`"));
        (shape, values)
    }

    /// Names that start with `prefix`, without it.
    pub fn names<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.arrays.keys().filter_map(move |name| name.strip_prefix(prefix))
    }
}
