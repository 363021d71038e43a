//! LZF, the compression of `compression="lzf"` in h5py.

/// Unpacks at most `limit` bytes; `None` if the bytes are no LZF stream or give more.
///
/// A control byte below 32 is followed by one literal more than it says. Others repeat earlier output:
/// the upper three bits are the length less 2, 7 adding the next byte; the lower five and the byte that follows
/// say how far back, less 1.
pub(crate) fn unpack(packed: &[u8], limit: usize) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut rest = packed;
    while let [control, after @ ..] = rest {
        let control = usize::from(*control);
        if control < 32 {
            let (literals, after) = after.split_at_checked(control + 1)?;
            out.extend_from_slice(literals);
            rest = after;
        } else {
            let (more, after) = if control >> 5 == 7 { after.split_first()? } else { (&0, after) };
            let (low, after) = after.split_first()?;
            let start = out.len().checked_sub((control & 31) * 256 + usize::from(*low) + 1)?;
            // What is repeated may reach into what is being written.
            for at in start..start + (control >> 5) + usize::from(*more) + 2 {
                out.push(out[at]);
            }
            rest = after;
        }
        if out.len() > limit {
            return None;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::unpack;

    #[test]
    fn literals_and_repeats() {
        // `ab`, then 3 bytes from 2 back, then 12 from 1 back.
        let packed = [1, b'a', b'b', 0x20, 1, 0xe0, 3, 0];
        assert_eq!(unpack(&packed, 17).unwrap(), b"ababaaaaaaaaaaaaa");
        assert_eq!(unpack(&packed, 16), None);
        assert_eq!(unpack(&[], 0).unwrap(), b"");
        for broken in [&[0x20, 1][..], &[3, b'a'], &[0, b'a', 0xe0, 3], &[0, b'a', 0x20, 1]] {
            assert_eq!(unpack(broken, 100), None, "{broken:?}");
        }
    }
}
