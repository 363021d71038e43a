//! Storage and accumulation of one kind of op.

use crate::Precision;
use serde::de::{MapAccess, Visitor, value::MapAccessDeserializer, value::StrDeserializer};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;

/// How one kind of op stores its operands and results, and how it forms sums over them.
///
/// In configuration files this is the storage alone, as in `transform = "f16"`, or a table
/// `{ storage = "f16", accumulate = "f32" }`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpPrecision {
    /// What tensors between ops hold.
    pub storage: Precision,
    /// What sums inside the op are formed in.
    pub accumulate: Precision,
}

impl OpPrecision {
    /// A storage with its natural accumulation, [`Precision::accumulate`].
    #[must_use]
    pub const fn of(storage: Precision) -> Self {
        OpPrecision { storage, accumulate: storage.accumulate() }
    }
}

/// As in configuration files.
impl fmt::Display for OpPrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OpPrecision { storage, accumulate } = self;
        if *self == OpPrecision::of(*storage) {
            return write!(f, "\"{storage}\"");
        }
        write!(f, "{{ storage = \"{storage}\", accumulate = \"{accumulate}\" }}")
    }
}

impl Serialize for OpPrecision {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if *self == OpPrecision::of(self.storage) {
            return self.storage.serialize(serializer);
        }
        let mut table = serializer.serialize_struct("OpPrecision", 2)?;
        table.serialize_field("storage", &self.storage)?;
        table.serialize_field("accumulate", &self.accumulate)?;
        table.end()
    }
}

impl<'de> Deserialize<'de> for OpPrecision {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OpPrecisionVisitor)
    }
}

struct OpPrecisionVisitor;

/// The long form, with derived reading.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    storage: Precision,
    accumulate: Option<Precision>,
}

impl<'de> Visitor<'de> for OpPrecisionVisitor {
    type Value = OpPrecision;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a precision (f64, f32, bf16, f16) or a table of `storage` and `accumulate`")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<OpPrecision, E> {
        Precision::deserialize(StrDeserializer::new(name)).map(OpPrecision::of)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<OpPrecision, A::Error> {
        let Table { storage, accumulate } = Table::deserialize(MapAccessDeserializer::new(map))?;
        Ok(OpPrecision { storage, accumulate: accumulate.unwrap_or(storage.accumulate()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision::{F16, F32, F64};

    #[test]
    fn both_forms_are_read_and_written_back() {
        for (text, want) in [
            (r#""f16""#, OpPrecision { storage: F16, accumulate: F32 }),
            (r#""f64""#, OpPrecision { storage: F64, accumulate: F64 }),
            (r#"{"storage":"f32"}"#, OpPrecision { storage: F32, accumulate: F32 }),
            (r#"{"storage":"f32","accumulate":"f64"}"#, OpPrecision { storage: F32, accumulate: F64 }),
        ] {
            let op: OpPrecision = serde_json::from_str(text).unwrap();
            assert_eq!(op, want, "{text}");
            let written = serde_json::to_string(&op).unwrap();
            assert_eq!(serde_json::from_str::<OpPrecision>(&written).unwrap(), want, "{written}");
        }
    }

    #[test]
    fn errors_name_what_is_legal() {
        let message = |text: &str| serde_json::from_str::<OpPrecision>(text).unwrap_err().to_string();
        assert!(message(r#""fp16""#).contains("unknown variant `fp16`, expected one of `f64`"));
        assert!(message(r#"{"store":"f16"}"#).contains("unknown field `store`, expected `storage`"));
        assert!(message("16").contains("a precision (f64, f32, bf16, f16) or a table"));
    }
}
