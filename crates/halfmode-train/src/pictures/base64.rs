//! Base64 as in RFC 4648, for images inside the report.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// `bytes` as padded base64.
pub(super) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let mut bits = 0_u32;
        for idx in 0..3 {
            bits = bits << 8 | u32::from(group.get(idx).copied().unwrap_or(0));
        }
        for idx in 0..4 {
            // Three bytes are four letters, two are three, one is two; the rest is padding.
            if idx > group.len() {
                text.push('=');
            } else {
                let letter = bits >> (18 - 6 * idx) & 63;
                text.push(char::from(ALPHABET[letter as usize]));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::encode;

    #[test]
    fn matches_the_vectors_of_the_standard() {
        let vectors = ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"];
        for (length, want) in vectors.into_iter().enumerate() {
            assert_eq!(encode(&b"foobar"[..length]), want);
        }
        assert_eq!(encode(&[0xff, 0xff, 0xfe]), "///+");
    }
}
