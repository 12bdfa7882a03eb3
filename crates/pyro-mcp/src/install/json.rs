//! An entry in a JSON file, with or without comments.

use jsonc_parser::ParseOptions;
use jsonc_parser::cst::{CstInputValue, CstRootNode};
use serde_json::Value;

/// The text with `section.name` set to the entry.
pub(super) fn with_entry(text: &str, section: &str, name: &str, entry: &Value) -> Result<String, String> {
    let text = if text.trim().is_empty() { "{}\n" } else { text };
    let root = CstRootNode::parse(text, &ParseOptions::default()).map_err(|error| error.to_string())?;
    let object = root.object_value_or_create().ok_or("it is no JSON object")?;
    let servers =
        object.object_value_or_create(section).ok_or_else(|| format!("'{section}' in it is no object"))?;
    match servers.get(name) {
        // Keys that somebody has added to it, such as `env`, stay.
        Some(there) if there.object_value().is_some() => {
            let (Some(object), Some(ours)) = (there.object_value(), entry.as_object()) else {
                return Err(format!("'{section}.{name}' in it is no object"));
            };
            for (key, value) in ours {
                match object.get(key) {
                    Some(kept) if kept.to_serde_value().as_ref() == Some(value) => {}
                    Some(other) => other.set_value(input(value)),
                    None => drop(object.append(key, input(value))),
                }
            }
        }
        Some(there) => there.set_value(input(entry)),
        None => drop(servers.append(name, input(entry))),
    }
    Ok(root.to_string())
}

fn input(value: &Value) -> CstInputValue {
    match value {
        Value::Null => CstInputValue::Null,
        Value::Bool(bool) => CstInputValue::Bool(*bool),
        Value::Number(number) => CstInputValue::Number(number.to_string()),
        Value::String(text) => CstInputValue::String(text.clone()),
        Value::Array(values) => CstInputValue::Array(values.iter().map(input).collect()),
        Value::Object(object) => {
            CstInputValue::Object(object.iter().map(|(name, value)| (name.clone(), input(value))).collect())
        }
    }
}
