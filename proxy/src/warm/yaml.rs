//! The images that manifests of Kubernetes name.

use serde::Deserialize;

/// Every value of a key `image` in documents of YAML or JSON, in their order and once: those of a Deployment, or of
/// all that `helm template` prints.
pub fn images_in(text: &str) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let value = serde_yaml_ng::Value::deserialize(document).map_err(|error| error.to_string())?;
        walk(&value, &mut found);
    }
    Ok(found)
}

fn walk(value: &serde_yaml_ng::Value, found: &mut Vec<String>) {
    match value {
        serde_yaml_ng::Value::Mapping(mapping) => {
            for (key, value) in mapping {
                match (key.as_str(), value.as_str()) {
                    (Some("image"), Some(image)) if !found.iter().any(|known| known == image) => {
                        found.push(image.to_owned());
                    }
                    _ => walk(value, found),
                }
            }
        }
        serde_yaml_ng::Value::Sequence(values) => values.iter().for_each(|value| walk(value, found)),
        _ => {}
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
        assert!(images_in("a: [").is_err());
    }
}
