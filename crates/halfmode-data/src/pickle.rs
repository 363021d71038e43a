//! The part of Python's pickle format that `torch.save` writes for tensors, read without running
//! anything: what a file asks to call is looked up in a short list, and what is not there becomes
//! [`Value::Other`].

use std::collections::HashMap;
use std::rc::Rc;

/// What a pickle holds.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Bool,
    Int(i64),
    Text(Rc<str>),
    /// `module name` of something that can be called.
    Global(Rc<str>),
    Tuple(Rc<Items>),
    List(Rc<Items>),
    Dict(Rc<Pairs>),
    Storage(Rc<Storage>),
    Tensor(Rc<TensorRef>),
    /// Anything else.
    Other,
}

#[derive(Debug, Default)]
pub(crate) struct Items {
    pub(crate) values: Vec<Value>,
    depth: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Pairs {
    pub(crate) entries: Vec<(Value, Value)>,
    depth: usize,
}

/// A file of the archive that holds scalars.
#[derive(Debug)]
pub(crate) struct Storage {
    /// As in `torch FloatStorage`.
    pub(crate) kind: Rc<str>,
    pub(crate) key: Rc<str>,
    pub(crate) numel: usize,
}

/// A strided view of a storage.
#[derive(Debug)]
pub(crate) struct TensorRef {
    pub(crate) storage: Rc<Storage>,
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    pub(crate) strides: Vec<usize>,
}

/// Nesting that is followed; deeper files are refused.
const MAX_DEPTH: usize = 64;

type Parsed<T> = Result<T, String>;

impl Value {
    fn depth(&self) -> usize {
        match self {
            Value::Tuple(items) | Value::List(items) => items.depth,
            Value::Dict(pairs) => pairs.depth,
            _ => 0,
        }
    }

    fn tuple(&self) -> Parsed<&[Value]> {
        if let Value::Tuple(items) = self { Ok(&items.values) } else { Err("a tuple is missing".to_owned()) }
    }

    fn size(&self) -> Parsed<usize> {
        match self {
            Value::Int(value) => usize::try_from(*value).map_err(|_| format!("{value} where a size should be")),
            _ => Err("a size is missing".to_owned()),
        }
    }
}

fn deeper<'a>(values: impl IntoIterator<Item = &'a Value>) -> Parsed<usize> {
    let depth = 1 + values.into_iter().map(Value::depth).max().unwrap_or(0);
    if depth > MAX_DEPTH { Err(format!("it is nested deeper than {MAX_DEPTH}")) } else { Ok(depth) }
}

fn items(values: Vec<Value>) -> Parsed<Rc<Items>> {
    let depth = deeper(&values)?;
    Ok(Rc::new(Items { values, depth }))
}

/// The one value that the bytes describe. The sentence says what is wrong with them.
pub(crate) fn parse(bytes: &[u8]) -> Parsed<Value> {
    let mut machine = Machine { bytes, at: 0, stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    while !machine.step()? {}
    machine.pop()
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
}

impl Machine<'_> {
    fn take(&mut self, n: usize) -> Parsed<&[u8]> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| "it ends too early".to_owned())?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A little-endian number of `n` bytes.
    fn unsigned(&mut self, n: usize) -> Parsed<u64> {
        Ok(self.take(n)?.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    fn text(&mut self, length_bytes: usize) -> Parsed<Value> {
        let n = usize::try_from(self.unsigned(length_bytes)?).map_err(|err| err.to_string())?;
        let text = std::str::from_utf8(self.take(n)?).map_err(|err| err.to_string())?;
        Ok(Value::Text(text.into()))
    }

    fn line(&mut self) -> Parsed<String> {
        let n = self.bytes[self.at..].iter().position(|&byte| byte == b'\n').ok_or("it ends too early")?;
        let line = String::from_utf8_lossy(self.take(n)?).into_owned();
        self.at += 1;
        Ok(line)
    }

    fn pop(&mut self) -> Parsed<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("it takes a value that is not there".to_owned());
        }
        self.stack.pop().ok_or_else(|| "it takes a value that is not there".to_owned())
    }

    fn pop_n(&mut self, n: usize) -> Parsed<Vec<Value>> {
        let mut values = (0..n).map(|_| self.pop()).collect::<Parsed<Vec<_>>>()?;
        values.reverse();
        Ok(values)
    }

    fn pop_mark(&mut self) -> Parsed<Vec<Value>> {
        let mark = self.marks.pop().filter(|&mark| mark <= self.stack.len()).ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }

    fn memoise(&mut self, key: u64) -> Parsed<()> {
        let top = match self.stack.last().ok_or("nothing to remember")? {
            // They change after they were remembered; nobody needs them twice.
            Value::List(_) | Value::Dict(_) => Value::Other,
            value => value.clone(),
        };
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Parsed<Value> {
        self.memo.get(&key).cloned().ok_or_else(|| format!("value {key} was never remembered"))
    }

    fn set_items(&mut self, pairs: Vec<Value>) -> Parsed<()> {
        let depth = deeper(&pairs)?;
        if let Value::Dict(dict) = self.pop()? {
            let mut dict = Rc::try_unwrap(dict).map_err(|_| "a dictionary is shared".to_owned())?;
            dict.depth = dict.depth.max(depth);
            let mut values = pairs.into_iter();
            while let (Some(key), Some(value)) = (values.next(), values.next()) {
                dict.entries.push((key, value));
            }
            self.stack.push(Value::Dict(Rc::new(dict)));
        } else {
            self.stack.push(Value::Other);
        }
        Ok(())
    }

    fn append(&mut self, values: Vec<Value>) -> Parsed<()> {
        let depth = deeper(&values)?;
        if let Value::List(list) = self.pop()? {
            let mut list = Rc::try_unwrap(list).map_err(|_| "a list is shared".to_owned())?;
            list.depth = list.depth.max(depth);
            list.values.extend(values);
            self.stack.push(Value::List(Rc::new(list)));
        } else {
            self.stack.push(Value::Other);
        }
        Ok(())
    }

    /// One instruction; true at the end.
    fn step(&mut self) -> Parsed<bool> {
        let code = self.take(1)?[0];
        let value = match code {
            0x80 => {
                self.take(1)?;
                return Ok(false);
            }
            // Frames of protocol 4 only say how long they are.
            0x95 => {
                self.take(8)?;
                return Ok(false);
            }
            b'.' => return Ok(true),
            b'(' => {
                self.marks.push(self.stack.len());
                return Ok(false);
            }
            b'0' => {
                self.pop()?;
                return Ok(false);
            }
            b'q' => return self.unsigned(1).and_then(|key| self.memoise(key)).map(|()| false),
            b'r' => return self.unsigned(4).and_then(|key| self.memoise(key)).map(|()| false),
            0x94 => return self.memoise(self.memo.len() as u64).map(|()| false),
            b'h' => {
                let key = self.unsigned(1)?;
                self.recall(key)?
            }
            b'j' => {
                let key = self.unsigned(4)?;
                self.recall(key)?
            }
            b'N' => Value::Other,
            0x88 | 0x89 => Value::Bool,
            b'K' => Value::Int(self.unsigned(1)? as i64),
            b'M' => Value::Int(self.unsigned(2)? as i64),
            b'J' => Value::Int(i64::from(self.unsigned(4)? as u32 as i32)),
            0x8a => {
                let n = self.unsigned(1)? as usize;
                let bytes = self.take(n)?;
                // Longer numbers are no sizes.
                let fits = (n <= 8).then(|| {
                    let negative = bytes.last().is_some_and(|byte| byte & 0x80 > 0);
                    let fill = if negative { !0u64 } else { 0 };
                    bytes.iter().rev().fold(fill, |value, &byte| value << 8 | u64::from(byte)) as i64
                });
                fits.map_or(Value::Other, Value::Int)
            }
            b'G' => {
                self.take(8)?;
                Value::Other
            }
            b'X' => self.text(4)?,
            0x8c => self.text(1)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                Value::Global(format!("{module} {name}").into())
            }
            0x93 => match &self.pop_n(2)?[..] {
                [Value::Text(module), Value::Text(name)] => Value::Global(format!("{module} {name}").into()),
                _ => Value::Other,
            },
            b')' => Value::Tuple(Rc::default()),
            0x85..=0x87 => Value::Tuple(items(self.pop_n(usize::from(code - 0x84))?)?),
            b't' => Value::Tuple(items(self.pop_mark()?)?),
            b']' => Value::List(Rc::default()),
            b'l' => Value::List(items(self.pop_mark()?)?),
            b'}' => Value::Dict(Rc::default()),
            b'a' => return self.pop().and_then(|value| self.append(vec![value])).map(|()| false),
            b'e' => return self.pop_mark().and_then(|values| self.append(values)).map(|()| false),
            b's' => return self.pop_n(2).and_then(|pair| self.set_items(pair)).map(|()| false),
            b'u' => return self.pop_mark().and_then(|pairs| self.set_items(pairs)).map(|()| false),
            b'Q' => storage(&self.pop()?)?,
            b'R' | 0x81 => {
                let arguments = self.pop()?;
                call(&self.pop()?, &arguments)?
            }
            // The state of an object; what it belongs to stays.
            b'b' => {
                self.pop()?;
                return Ok(false);
            }
            code => return Err(format!("instruction 0x{code:02x} is not one that torch.save writes for tensors")),
        };
        self.stack.push(value);
        Ok(false)
    }
}

/// `("storage", type, key, location, numel)`
fn storage(id: &Value) -> Parsed<Value> {
    match id.tuple()? {
        [Value::Text(tag), Value::Global(kind), Value::Text(key), _, numel] if &**tag == "storage" => {
            let storage = Storage { kind: Rc::clone(kind), key: Rc::clone(key), numel: numel.size()? };
            Ok(Value::Storage(Rc::new(storage)))
        }
        _ => Ok(Value::Other),
    }
}

fn call(function: &Value, arguments: &Value) -> Parsed<Value> {
    let Value::Global(name) = function else { return Ok(Value::Other) };
    match (&**name, arguments) {
        ("torch._utils _rebuild_tensor_v2" | "torch._utils _rebuild_tensor", Value::Tuple(arguments)) => {
            let [Value::Storage(storage), offset, shape, strides, ..] = &arguments.values[..] else {
                return Err("a tensor without a storage".to_owned());
            };
            let sizes = |value: &Value| value.tuple()?.iter().map(Value::size).collect::<Parsed<Vec<usize>>>();
            let (shape, strides) = (sizes(shape)?, sizes(strides)?);
            if shape.len() != strides.len() {
                return Err(format!("a tensor of shape {shape:?} with strides {strides:?}"));
            }
            let tensor = TensorRef { storage: Rc::clone(storage), offset: offset.size()?, shape, strides };
            Ok(Value::Tensor(Rc::new(tensor)))
        }
        ("torch._utils _rebuild_parameter", Value::Tuple(arguments)) => {
            Ok(arguments.values.first().cloned().unwrap_or(Value::Other))
        }
        ("collections OrderedDict", _) => Ok(Value::Dict(Rc::default())),
        _ => Ok(Value::Other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_is_run_and_unknown_calls_are_skipped() {
        // os.system("echo") leaves no trace.
        let value = parse(b"\x80\x02cos\nsystem\nX\x04\0\0\0echo\x85R.").unwrap();
        assert!(matches!(value, Value::Other));
        assert!(parse(b"\x80\x02ios\nsystem\n.").unwrap_err().contains("0x69"));
    }

    #[test]
    fn hostile_streams_end() {
        for bytes in [&b""[..], b".", b"(", b"t", b"u", b"}u", b"]e", b"h\x01", b"X\xff\xff\xff\xff", b"\x85", b"cabc"]
        {
            assert!(parse(bytes).is_err(), "{bytes:?}");
        }
        // Tuples in tuples, by doubling and by depth.
        let mut nested = b")".to_vec();
        nested.extend(b"\x85".repeat(10_000));
        nested.push(b'.');
        assert!(parse(&nested).unwrap_err().contains("nested"));
        let mut doubled = b")q\x00".to_vec();
        (0..60).for_each(|_| doubled.extend(b"h\x00\x86q\x00"));
        doubled.push(b'.');
        assert!(parse(&doubled).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn any_instructions_are_parsed_or_refused(
            codes in proptest::collection::vec(prop::sample::select(&b"(q\x00h\x00NK\x01)\x85\x86\x87t]l}aesuQRb0.\x88M\x01\x00"[..]), 0..80)
        ) {
            let _ = parse(&codes);
        }
    }
}
