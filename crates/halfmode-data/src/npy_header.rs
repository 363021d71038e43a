//! The header of a `.npy` array: its element type, order and shape.
//!
//! The header is a Python literal. `ndarray-npy` reads it with a general recursive parser, which a
//! file of a few thousand brackets can drive out of stack. This one knows the three keys that
//! exist, does not recurse and reads at most 64 KiB.

use std::io::Read;

use halfmode_precision::Domain;

use crate::error::{Error, Result};

/// Longest header that is read. NumPy itself refuses more than 10 000 bytes by default.
const MAX_HEADER: usize = 1 << 16;
/// Most axes that NumPy has.
const MAX_RANK: usize = 64;

/// Scalar types that can be read; a complex element is two of [`Self::F32`] or [`Self::F64`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NumpyType {
    /// Half precision, `f2`.
    F16,
    /// Single precision, `f4`.
    F32,
    /// Double precision, `f8`.
    F64,
    /// One byte, zero or not, `b1`.
    Bool,
    /// `i1`.
    I8,
    /// `i2`.
    I16,
    /// `i4`.
    I32,
    /// `i8`.
    I64,
    /// `u1`.
    U8,
    /// `u2`.
    U16,
    /// `u4`.
    U32,
    /// `u8`.
    U64,
}

impl NumpyType {
    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::I8 | Self::U8 => 1,
            Self::F16 | Self::I16 | Self::U16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// The short name: `f16`, `bool`, `u8`, …
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bool => "bool",
            Self::I8 => "i8",
            Self::I16 => "i16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U8 => "u8",
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::U64 => "u64",
        }
    }

    fn from_code(code: &str) -> Option<Self> {
        Some(match code {
            "f2" => Self::F16,
            "f4" => Self::F32,
            "f8" => Self::F64,
            "b1" => Self::Bool,
            "i1" => Self::I8,
            "i2" => Self::I16,
            "i4" => Self::I32,
            "i8" => Self::I64,
            "u1" => Self::U8,
            "u2" => Self::U16,
            "u4" => Self::U32,
            "u8" => Self::U64,
            _ => return None,
        })
    }
}

/// What a stored array is, without its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArrayInfo {
    /// Type of every scalar in the file.
    pub dtype: NumpyType,
    /// Whether elements are complex, `c8` or `c16`: the shape then ends with an axis of 2 that the header does
    /// not name, real and imaginary part.
    pub domain: Domain,
    /// Whether the bytes of an element come most significant first.
    pub big_endian: bool,
    /// Whether the first axis varies fastest in the file.
    pub fortran_order: bool,
    /// Length of every axis, as the array is read.
    pub shape: Vec<usize>,
    /// Bytes before the data.
    pub header_bytes: u64,
}

impl ArrayInfo {
    /// The short name of an element's type: `f32`, `cf64`, …
    #[must_use]
    pub fn type_name(&self) -> String {
        let prefix = if self.domain == Domain::Complex { "c" } else { "" };
        format!("{prefix}{}", self.dtype.name())
    }

    /// Number of scalars. The parser has checked that it, and the bytes, fit 63 bits.
    #[must_use]
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of data in the file.
    #[must_use]
    pub fn n_bytes(&self) -> u64 {
        (self.n_elements() * self.dtype.size()) as u64
    }
}

/// Reads and checks a header; the reader is left at the first byte of data.
pub(crate) fn read_header(reader: &mut (impl Read + ?Sized), origin: &str) -> Result<ArrayInfo> {
    let bad = |reason: &str| Error::NpyHeader { origin: origin.to_owned(), reason: reason.to_owned() };
    let mut prefix = [0u8; 8];
    fill(reader, &mut prefix, origin)?;
    if &prefix[..6] != b"\x93NUMPY" {
        return Err(bad("it does not start with the magic bytes \\x93NUMPY"));
    }
    let (length, prefix_bytes) = match prefix[6] {
        1 => {
            let mut length = [0u8; 2];
            fill(reader, &mut length, origin)?;
            (usize::from(u16::from_le_bytes(length)), 10)
        }
        2 | 3 => {
            let mut length = [0u8; 4];
            fill(reader, &mut length, origin)?;
            (u32::from_le_bytes(length) as usize, 12)
        }
        version => return Err(bad(&format!("format version {version} is not known"))),
    };
    if length > MAX_HEADER {
        return Err(bad(&format!("the header claims {length} bytes, more than {MAX_HEADER}")));
    }
    let mut text = vec![0u8; length];
    fill(reader, &mut text, origin)?;
    let text = std::str::from_utf8(&text).map_err(|_| bad("the header is not text"))?;
    let fields = Parser { rest: text }.dictionary().map_err(|fault| match fault {
        Fault::Syntax(reason) => bad(reason),
        Fault::Structured(dtype) => Error::UnsupportedType { origin: origin.to_owned(), dtype },
    })?;
    let descr = fields.descr.ok_or_else(|| bad("the key `descr` is missing"))?;
    let fortran_order = fields.fortran_order.ok_or_else(|| bad("the key `fortran_order` is missing"))?;
    let mut shape = fields.shape.ok_or_else(|| bad("the key `shape` is missing"))?;
    let (big_endian, code) = match descr.as_bytes().first() {
        Some(b'>') => (true, &descr[1..]),
        Some(b'<' | b'|' | b'=') => (false, &descr[1..]),
        _ => (false, descr),
    };
    let (domain, code) = match code {
        "c8" => (Domain::Complex, "f4"),
        "c16" => (Domain::Complex, "f8"),
        _ => (Domain::Real, code),
    };
    let dtype = NumpyType::from_code(code)
        .ok_or_else(|| Error::UnsupportedType { origin: origin.to_owned(), dtype: descr.to_owned() })?;
    if domain == Domain::Complex {
        shape.push(2);
    }
    // Empty axes do not excuse absurd ones: every partial product must be addressable.
    shape
        .iter()
        .try_fold(8usize, |bytes, &n| bytes.checked_mul(n.max(1)))
        .filter(|&bytes| isize::try_from(bytes).is_ok())
        .ok_or_else(|| bad(&format!("shape {shape:?} is too large for any memory")))?;
    let header_bytes = (prefix_bytes + length) as u64;
    Ok(ArrayInfo { dtype, domain, big_endian, fortran_order, shape, header_bytes })
}

fn fill(reader: &mut (impl Read + ?Sized), bytes: &mut [u8], origin: &str) -> Result<()> {
    reader.read_exact(bytes).map_err(|error| Error::NpyHeader {
        origin: origin.to_owned(),
        reason: if error.kind() == std::io::ErrorKind::UnexpectedEof {
            "the file ends inside the header".to_owned()
        } else {
            error.to_string()
        },
    })
}

enum Fault {
    Syntax(&'static str),
    /// `descr` is not a plain string: a structured type.
    Structured(String),
}

#[derive(Default)]
struct Fields<'a> {
    descr: Option<&'a str>,
    fortran_order: Option<bool>,
    shape: Option<Vec<usize>>,
}

/// A cursor over `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`.
struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn dictionary(mut self) -> Result<Fields<'a>, Fault> {
        let mut fields = Fields::default();
        self.expect('{', "the header is not a dictionary")?;
        while !self.take('}') {
            let key = self.string("a key of the header is not a string")?;
            self.expect(':', "a key of the header has no value")?;
            match key {
                "descr" => {
                    if !self.next_is(['\'', '"']) {
                        let text: String = self.rest.trim().chars().take(60).collect();
                        return Err(Fault::Structured(text));
                    }
                    fields.descr = Some(self.string("`descr` is not a string")?);
                }
                "fortran_order" => fields.fortran_order = Some(self.boolean()?),
                "shape" => fields.shape = Some(self.shape()?),
                _ => return Err(Fault::Syntax("the header has an unknown key")),
            }
            if !self.take(',') && !self.next_is(['}', '}']) {
                return Err(Fault::Syntax("the entries of the header are not separated"));
            }
        }
        if self.rest.trim().is_empty() {
            Ok(fields)
        } else {
            Err(Fault::Syntax("there is text after the header's dictionary"))
        }
    }

    fn next_is(&mut self, options: [char; 2]) -> bool {
        self.rest = self.rest.trim_start();
        self.rest.starts_with(options)
    }

    fn take(&mut self, wanted: char) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(wanted) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, wanted: char, otherwise: &'static str) -> Result<(), Fault> {
        if self.take(wanted) { Ok(()) } else { Err(Fault::Syntax(otherwise)) }
    }

    fn string(&mut self, otherwise: &'static str) -> Result<&'a str, Fault> {
        for quote in ['\'', '"'] {
            if self.take(quote) {
                let (text, rest) =
                    self.rest.split_once(quote).ok_or(Fault::Syntax("a string of the header does not end"))?;
                self.rest = rest;
                return Ok(text);
            }
        }
        Err(Fault::Syntax(otherwise))
    }

    fn boolean(&mut self) -> Result<bool, Fault> {
        self.rest = self.rest.trim_start();
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = self.rest.strip_prefix(word) {
                self.rest = rest;
                return Ok(value);
            }
        }
        Err(Fault::Syntax("`fortran_order` is neither True nor False"))
    }

    fn shape(&mut self) -> Result<Vec<usize>, Fault> {
        let mut shape = Vec::new();
        self.expect('(', "`shape` is not a tuple")?;
        while !self.take(')') {
            self.rest = self.rest.trim_start();
            let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
            let (digits, rest) = self.rest.split_at(end);
            let n =
                digits.parse().map_err(|_| Fault::Syntax("`shape` holds something that is not a length of an axis"))?;
            // Python 2 wrote long integers as `3L`.
            self.rest = rest.strip_prefix('L').unwrap_or(rest);
            if shape.len() == MAX_RANK {
                return Err(Fault::Syntax("`shape` has more than 64 axes"));
            }
            shape.push(n);
            if !self.take(',') && !self.next_is([')', ')']) {
                return Err(Fault::Syntax("the lengths in `shape` are not separated"));
            }
        }
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ArrayInfo> {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        read_header(&mut bytes.as_slice(), "test")
    }

    #[test]
    fn headers_of_numpy_are_read() {
        let info = parse("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }   \n").unwrap();
        assert_eq!(info.dtype, NumpyType::F32);
        assert_eq!(info.shape, [3, 4]);
        assert!(!info.fortran_order && !info.big_endian);
        assert_eq!(info.n_bytes(), 48);
        let info = parse("{\"shape\":(7L,),'fortran_order':True,'descr':'>i2'}").unwrap();
        assert_eq!((info.shape.as_slice(), info.big_endian), ([7].as_slice(), true));
        assert!(info.fortran_order);
        let info = parse("{'descr': '|b1', 'fortran_order': False, 'shape': ()}").unwrap();
        assert_eq!((info.n_elements(), info.dtype), (1, NumpyType::Bool));
    }

    #[test]
    fn other_types_are_named() {
        for dtype in ["<c32", "|O", "<U5", "<M8[ns]", "f3", ""] {
            let text = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': (3,)}}");
            let error = parse(&text).unwrap_err();
            assert!(matches!(&error, Error::UnsupportedType { dtype: found, .. } if found == dtype));
        }
        let error = parse("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}");
        assert!(matches!(error, Err(Error::UnsupportedType { .. })));
    }

    #[test]
    fn absurd_headers_are_refused() {
        for text in [
            "",
            "{",
            "{}",
            "[]",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999999999)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999, 99999999999)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1 2)}",
            "{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} 1",
            "{'descr': '<f4' 'fortran_order': False, 'shape': (1,)}",
            "{'descr': '<f4, 'fortran_order': False}",
            "{'descr': '<f4', 'extra': 1}",
        ] {
            assert!(matches!(parse(text), Err(Error::NpyHeader { .. })), "{text}");
        }
        assert!(parse(&"(".repeat(60_000)).is_err());
        assert!(parse(&format!("{{'descr': {}", "[".repeat(60_000))).is_err());
        let ones = "1,".repeat(65);
        assert!(parse(&format!("{{'shape': ({ones})}}")).is_err());
    }
}
