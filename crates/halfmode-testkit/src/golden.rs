//! Recorded outputs and gradients of the peers.

use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// One recorded case: every array in double precision, by name.
#[derive(Clone, Debug)]
pub struct Golden {
    arrays: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Golden {
    /// Reads `tests/golden/NAME.safetensors` of the workspace.
    ///
    /// # Panics
    /// If the file is missing or not what it should be.
    #[must_use]
    pub fn load(name: &str) -> Self {
        let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden"))
            .join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let arrays = file.tensors().into_iter().map(|(name, tensor)| {
            let data = tensor.data();
            let values = match tensor.dtype() {
                safetensors::Dtype::F64 => {
                    data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
                }
                safetensors::Dtype::F32 => {
                    data.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
                }
                other => panic!("{name}: {other:?} is not expected in a golden file"),
            };
            (name, (tensor.shape().to_vec(), values))
        });
        Golden { arrays: arrays.collect() }
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
