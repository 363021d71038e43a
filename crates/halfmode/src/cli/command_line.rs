//! The command that is running, with a change: what a user can run next.

/// The command with `option value` in place of what it said of it: of `--set`, of the same key.
pub(crate) fn with(option: &str, value: &str) -> String {
    changed(std::env::args().skip(1), option, value)
}

/// The command with a flag, once.
pub(crate) fn flagged(line: &str, flag: &str) -> String {
    if line.split(' ').any(|word| word == flag) { line.to_owned() } else { format!("{line} {flag}") }
}

fn changed(words: impl Iterator<Item = String>, option: &str, value: &str) -> String {
    let key = value.split_once('=').map(|(key, _)| format!("{key}="));
    let replaced = |value: &str| key.as_ref().is_none_or(|key| value.starts_with(key.as_str()));
    let mut line = "halfmode".to_owned();
    let mut push = |word: &str| line.push_str(&format!(" {}", quoted(word)));
    let mut words = words.peekable();
    while let Some(word) = words.next() {
        let joined = word.strip_prefix(option).and_then(|it| it.strip_prefix('='));
        if joined.is_some_and(replaced) {
            continue;
        }
        if word == option && words.peek().is_some_and(|value| replaced(value)) {
            words.next();
            continue;
        }
        push(&word);
    }
    [option, value].into_iter().for_each(push);
    line
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(line: &[&str], option: &str, value: &str) -> String {
        changed(line.iter().map(|&word| word.to_owned()), option, value)
    }

    #[test]
    fn an_option_is_replaced_or_added() {
        assert_eq!(change(&["train", "darcy"], "--device", "cpu"), "halfmode train darcy --device cpu");
        let line = ["--device", "cuda", "train", "my runs"];
        assert_eq!(change(&line, "--device", "cpu"), "halfmode train 'my runs' --device cpu");
        assert_eq!(change(&["plan", "a", "--device=cuda:1"], "--device", "cpu"), "halfmode plan a --device cpu");
        assert_eq!(flagged("halfmode train a --force", "--force"), "halfmode train a --force");
        assert_eq!(flagged("halfmode train a", "--force"), "halfmode train a --force");
    }

    #[test]
    fn of_set_only_the_same_key_is_replaced() {
        let line = ["train", "a", "--set", "train.epochs=2", "--set", "train.batch_size=9", "--set=train.batch_size=8"];
        let changed = change(&line, "--set", "train.batch_size=4");
        assert_eq!(changed, "halfmode train a --set train.epochs=2 --set train.batch_size=4");
    }
}
