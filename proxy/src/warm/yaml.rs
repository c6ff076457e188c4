//! The images in Kubernetes manifests.

use serde::Deserialize;
use serde_yaml_ng::Value;

/// Every value of a key `image` in YAML or JSON documents, in order and without duplicates. Also finds image volumes,
/// and plain lists of images.
pub fn images_in(text: &str) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let value = Value::deserialize(document).map_err(|error| error.to_string())?;
        add_list(&value, &mut found);
        walk(&value, &mut found);
    }
    Ok(found)
}

fn walk(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Mapping(mapping) => {
            for (key, value) in mapping {
                match key.as_str() {
                    Some("image") => match value {
                        Value::String(image) => add(image, found),
                        // An image volume.
                        Value::Mapping(volume) => match volume.get("reference").and_then(Value::as_str) {
                            Some(image) => add(image, found),
                            None => walk(value, found),
                        },
                        _ => walk(value, found),
                    },
                    Some("images") => {
                        add_list(value, found);
                        walk(value, found);
                    }
                    _ => walk(value, found),
                }
            }
        }
        Value::Sequence(values) => values.iter().for_each(|value| walk(value, found)),
        _ => {}
    }
}

fn add_list(value: &Value, found: &mut Vec<String>) {
    let texts = value.as_sequence().into_iter().flatten().filter_map(Value::as_str);
    texts.for_each(|image| add(image, found));
}

/// Adds an image. Charts render an unused image as an empty string.
fn add(image: &str, found: &mut Vec<String>) {
    if !image.is_empty() && !found.iter().any(|known| known == image) {
        found.push(image.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_found_in_manifests_of_any_shape() {
        let text = "kind: Deployment\nspec:\n  template:\n    spec:\n      initContainers: [{image: a}]\n      containers:\n      \
                    - {name: x, image: \"b:1\"}\n      - {image: a}\n---\n---\nkind: ConfigMap\ndata: {image: {name: x}}\n";
        assert_eq!(images_in(text).unwrap(), ["a", "b:1"]);
        let volume = "volumes:\n- name: m\n  image: {reference: \"c:2\", pullPolicy: Always}\n- image: \"\"\n";
        assert_eq!(images_in(volume).unwrap(), ["c:2"]);
        assert_eq!(images_in("- a\n- b:1\n").unwrap(), ["a", "b:1"]);
        assert_eq!(images_in("images: [a, b]\n").unwrap(), ["a", "b"]);
        assert!(images_in("a: [").is_err());
        assert_eq!(images_in("Error: chart not found\n").unwrap(), [""; 0]);
    }
}
