//! The document: any JSON, up to a size.

use serde_json::{Map, Value};

/// Why the document was not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Too large.
    #[error("the data store holds at most {0} bytes of JSON; send less or start with a larger --mmds-size-limit")]
    LimitExceeded(usize),
    /// A patch without anything to patch.
    #[error("the MMDS data store is not initialized: PUT /mmds first")]
    NotInitialized,
}

/// Why a path has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// Nothing there.
    #[error("not found")]
    NotFound,
    /// Neither an object nor a string: the text format has no words for it.
    #[error("Cannot retrieve value. The value has an unsupported type.")]
    UnsupportedValueType,
}

/// How a value is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON.
    Json,
    /// Text, as cloud instances know it: a string is itself, an object is the list of its names,
    /// with a slash after those of objects.
    Text,
}

/// The document.
#[derive(Debug)]
pub struct Store {
    /// `None` until the first PUT.
    value: Option<Value>,
    limit: usize,
}

impl Store {
    /// Nothing, and room for `limit` bytes of JSON.
    pub fn new(limit: usize) -> Self {
        Self { value: None, limit }
    }

    /// Most bytes of JSON.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The document; `None` if there never was one.
    pub fn value(&self) -> Option<&Value> {
        self.value.as_ref()
    }

    /// Replaces the document.
    ///
    /// # Errors
    /// It is too large; nothing changed then.
    pub fn put(&mut self, value: Value) -> Result<(), ChangeError> {
        if value.to_string().len() > self.limit {
            return Err(ChangeError::LimitExceeded(self.limit));
        }
        self.value = Some(value);
        Ok(())
    }

    /// Changes the document by a merge patch (RFC 7396).
    ///
    /// # Errors
    /// There is no document, or the result is too large; nothing changed then.
    pub fn patch(&mut self, patch: Value) -> Result<(), ChangeError> {
        let mut value = self.value.clone().ok_or(ChangeError::NotInitialized)?;
        merge(&mut value, patch);
        self.put(value)
    }

    /// The value at a path: a JSON pointer (RFC 6901), in which slashes may be repeated and one may
    /// stand at the end.
    ///
    /// # Errors
    /// There is none, or the format cannot show it.
    pub fn get(&self, path: &str, format: Format) -> Result<String, LookupError> {
        let path = collapse_slashes(path);
        let pointer = path.strip_suffix('/').unwrap_or(&path);
        let value = self.value.as_ref().unwrap_or(&Value::Null).pointer(pointer).ok_or(LookupError::NotFound)?;
        match (format, value) {
            (Format::Json, value) => Ok(value.to_string()),
            (Format::Text, Value::String(text)) => Ok(text.clone()),
            (Format::Text, Value::Object(members)) => Ok(list(members)),
            (Format::Text, _) => Err(LookupError::UnsupportedValueType),
        }
    }
}

fn list(members: &Map<String, Value>) -> String {
    let names = members.iter().map(|(name, value)| if value.is_object() { format!("{name}/") } else { name.clone() });
    names.collect::<Vec<_>>().join("\n")
}

/// `path` with one slash where there are several in a row.
pub fn collapse_slashes(path: &str) -> String {
    let mut collapsed = String::with_capacity(path.len());
    for character in path.chars() {
        if character != '/' || !collapsed.ends_with('/') {
            collapsed.push(character);
        }
    }
    collapsed
}

/// RFC 7396 §2. Depth is bounded: both sides were parsed, which ends at 128 levels.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(changes) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(members) = target else { return };
    for (name, change) in changes {
        if change.is_null() {
            members.remove(&name);
        } else {
            merge(members.entry(name).or_insert(Value::Null), change);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn store(value: Value) -> Store {
        let mut store = Store::new(51_200);
        store.put(value).unwrap();
        store
    }

    /// The examples of RFC 7396, appendix A: original, patch, result.
    #[test]
    fn a_patch_merges_as_the_rfc_shows() {
        for (original, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a": "b"}), json!(["c"]), json!(["c"])),
            (json!({"a": "foo"}), json!(null), json!(null)),
            (json!({"a": "foo"}), json!("bar"), json!("bar")),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let mut store = store(original.clone());
            store.patch(patch.clone()).unwrap();
            assert_eq!(store.value(), Some(&result), "{original} {patch}");
        }
    }

    #[test]
    fn a_patch_needs_a_document_even_an_empty_one() {
        let mut empty = Store::new(100);
        assert_eq!(empty.patch(json!({"a": 1})), Err(ChangeError::NotInitialized));
        assert_eq!(empty.value(), None);
        for value in [json!({}), json!(null), json!(""), json!([])] {
            let mut store = store(value);
            store.patch(json!({"a": 1})).unwrap();
            assert_eq!(store.value(), Some(&json!({"a": 1})));
        }
    }

    #[test]
    fn what_would_be_too_large_changes_nothing() {
        let mut store = Store::new(20);
        store.put(json!({"a": "0123456789"})).unwrap();
        let before = store.value().cloned();
        assert_eq!(store.put(json!({"a": "0123456789012"})), Err(ChangeError::LimitExceeded(20)));
        assert_eq!(store.patch(json!({"b": "x"})), Err(ChangeError::LimitExceeded(20)));
        assert_eq!(store.value().cloned(), before);
        store.put(json!({"a": "012345678901"})).unwrap();
        store.patch(json!({"a": null, "b": "012345678901"})).unwrap();
    }

    #[test]
    fn text_lists_objects_and_shows_strings_and_nothing_else() {
        let store = store(json!({
            "name": {"first": "John", "last": ""}, "age": 43, "list": ["x", {"k": "v"}], "no": null, "yes": true,
            "empty": {}, "a/b": {"m~n": "pointer"},
        }));
        let text = |path| store.get(path, Format::Text);
        assert_eq!(text("/").unwrap(), "a/b/\nage\nempty/\nlist\nname/\nno\nyes");
        assert_eq!(text("/name").unwrap(), "first\nlast");
        assert_eq!(text("//name///first/").unwrap(), "John");
        assert_eq!(text("/name/last").unwrap(), "", "an empty value is a value");
        assert_eq!(text("/empty/").unwrap(), "");
        assert_eq!(text("/list/0").unwrap(), "x");
        assert_eq!(text("/list/1/k").unwrap(), "v");
        assert_eq!(text("/a~1b/m~0n").unwrap(), "pointer");
        for path in ["/age", "/list", "/no", "/yes"] {
            assert_eq!(text(path), Err(LookupError::UnsupportedValueType), "{path}");
        }
        for path in ["/nope", "/name/first/x", "/list/2", "/list/-1"] {
            assert_eq!(text(path), Err(LookupError::NotFound), "{path}");
        }
    }

    #[test]
    fn json_shows_everything() {
        let store = store(json!({"name": {"first": "John"}, "age": 43, "no": null, "empty": ""}));
        for (path, expected) in [
            ("/", r#"{"age":43,"empty":"","name":{"first":"John"},"no":null}"#),
            ("/name", r#"{"first":"John"}"#),
            ("/name/first", "\"John\""),
            ("/age", "43"),
            ("/no", "null"),
            ("/empty", "\"\""),
        ] {
            assert_eq!(store.get(path, Format::Json).unwrap(), expected);
        }
        assert_eq!(Store::new(1).get("/x", Format::Json), Err(LookupError::NotFound));
    }
}
