//! Which data sets of an HDF5 file are arrays of numbers, and of which.

use hdf5_reader::{ByteOrder, CompoundField, Dataset, Datatype, VarLenKind};

use crate::npy_header::NumpyType;

/// The numbers of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Numbers {
    pub(crate) dtype: NumpyType,
    pub(crate) big_endian: bool,
    /// Whether an element is a pair: real and imaginary part.
    pub(crate) complex: bool,
}

/// The numbers of a data set, or in words what it holds instead.
pub(crate) fn numbers(dataset: &Dataset) -> Result<Numbers, String> {
    let text = |name: &str| dataset.attribute(name).and_then(|attribute| attribute.read_string()).unwrap_or_default();
    if dataset.shape().is_empty() && dataset.num_elements().is_ok_and(|n| n == 0) {
        return Err("it is empty and has no shape".to_owned());
    }
    if dataset.attribute("MATLAB_empty").is_ok() {
        return Err("an empty array of MATLAB".to_owned());
    }
    if text("NAME").starts_with("This is a netCDF dimension but not a netCDF variable") {
        return Err("a dimension of NetCDF without values".to_owned());
    }
    let plain = match dataset.dtype() {
        Datatype::Compound { size, fields } => return complex(*size, fields),
        // What h5py writes for booleans; other enumerations are their integers.
        Datatype::Enum { base, members } => {
            let mut names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
            names.sort_unstable();
            let number = plain(base)?;
            let boolean = names == ["FALSE", "TRUE"] && number.dtype.size() == 1;
            Numbers { dtype: if boolean { NumpyType::Bool } else { number.dtype }, ..number }
        }
        other => plain(other)?,
    };
    match text("MATLAB_class").as_str() {
        "char" => return Err("text of MATLAB".to_owned()),
        "logical" if plain.dtype.size() == 1 => return Ok(Numbers { dtype: NumpyType::Bool, ..plain }),
        _ => {}
    }
    if matches!(dataset.dtype(), Datatype::FloatingPoint { .. }) {
        // The reader keeps a float's size alone. Bits of exponent and mantissa stand behind class, flags, size,
        // bit offset and precision.
        let stored = dataset.raw_datatype().map_err(|err| err.to_string())?;
        let ieee = match plain.dtype {
            NumpyType::F16 => (5, 10),
            NumpyType::F32 => (8, 23),
            _ => (11, 52),
        };
        let found = (stored.get(13).copied().unwrap_or(0), stored.get(15).copied().unwrap_or(0));
        if found != ieee {
            let (exponent, mantissa) = found;
            return Err(format!("floats with {exponent} bits of exponent and {mantissa} of mantissa"));
        }
    }
    Ok(plain)
}

/// A float or an integer.
fn plain(datatype: &Datatype) -> Result<Numbers, String> {
    let (dtype, byte_order) = match datatype {
        Datatype::FloatingPoint { size, byte_order } => {
            let dtype = match size {
                2 => NumpyType::F16,
                4 => NumpyType::F32,
                8 => NumpyType::F64,
                _ => return Err(format!("floats of {size} bytes")),
            };
            (dtype, byte_order)
        }
        Datatype::FixedPoint { size, signed, byte_order } => {
            let dtype = match (size, signed) {
                (1, true) => NumpyType::I8,
                (2, true) => NumpyType::I16,
                (4, true) => NumpyType::I32,
                (8, true) => NumpyType::I64,
                (1, false) => NumpyType::U8,
                (2, false) => NumpyType::U16,
                (4, false) => NumpyType::U32,
                (8, false) => NumpyType::U64,
                _ => return Err(format!("integers of {size} bytes")),
            };
            (dtype, byte_order)
        }
        Datatype::String { .. } => return Err("text".to_owned()),
        Datatype::VarLen { kind: VarLenKind::String, .. } => return Err("text".to_owned()),
        Datatype::VarLen { .. } => return Err("lists of any length".to_owned()),
        Datatype::Compound { .. } => return Err("records with fields".to_owned()),
        Datatype::Enum { .. } => return Err("an enumeration within another type".to_owned()),
        Datatype::Array { .. } => return Err("elements that are arrays".to_owned()),
        Datatype::Reference { .. } => return Err("references to other objects".to_owned()),
        Datatype::Opaque { .. } | Datatype::Bitfield { .. } => return Err("bytes or bits without a meaning".to_owned()),
    };
    Ok(Numbers { dtype, big_endian: *byte_order == ByteOrder::BigEndian, complex: false })
}

/// Two floats named as h5py (`r`, `i`) or MATLAB (`real`, `imag`) names them, without a gap.
fn complex(size: u32, fields: &[CompoundField]) -> Result<Numbers, String> {
    if let [real, imaginary] = fields
        && [("r", "i"), ("real", "imag")].contains(&(&real.name, &imaginary.name))
        && real.datatype == imaginary.datatype
        && let Ok(part) = plain(&real.datatype)
        && matches!(part.dtype, NumpyType::F32 | NumpyType::F64)
        && real.byte_offset == 0
        && usize::try_from(imaginary.byte_offset) == Ok(part.dtype.size())
        && usize::try_from(size) == Ok(2 * part.dtype.size())
    {
        return Ok(Numbers { complex: true, ..part });
    }
    let names = fields.iter().take(8).map(|field| field.name.as_str()).collect::<Vec<_>>();
    Err(format!("records with fields {}", names.join(", ")))
}
