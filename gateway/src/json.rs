//! The proto3 JSON mapping of requests and answers, with errors that name the field.
//!
//! Unknown fields are refused. In answers every field is there, whatever its value, except messages that are not set.

use bytes::Bytes;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, ReflectMessage,
    SerializeOptions, Value,
};
use proto::Error;

use crate::contract::PACKAGE;

/// What a parser says can quote the whole request; the answer does not.
const LONGEST_COMPLAINT: usize = 200;

/// Reads a request's body. No body is a message without fields.
pub fn read_body(input: &MessageDescriptor, body: &[u8]) -> Result<DynamicMessage, Error> {
    let Ok(text) = std::str::from_utf8(body) else { return Err(Error::invalid("body", "must be UTF-8")) };
    if text.is_empty() {
        return Ok(DynamicMessage::new(input.clone()));
    }
    parse(input, text).map_err(|error| {
        // Only now, on the way to a refusal, is it worth finding out which field it was.
        match serde_json::from_str::<serde_json::Value>(text) {
            Ok(value) => fault(input, &value, "").unwrap_or_else(|| complaint("body", &error)),
            Err(error) => complaint("body", &error),
        }
    })
}

/// Sets a field from a path variable or a query parameter.
pub fn set_text(message: &mut DynamicMessage, field: &FieldDescriptor, text: &str) -> Result<(), Error> {
    let value = match field.kind() {
        Kind::String => Value::String(text.to_owned()),
        Kind::Bool => match text {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            _ => return Err(Error::invalid(field.name(), "must be true or false")),
        },
        _ => {
            let object = serde_json::json!({ field.json_name(): text }).to_string();
            let parsed = parse(&message.descriptor(), &object).map_err(|error| complaint(field.name(), &error))?;
            parsed.get_field(field).into_owned()
        }
    };
    message.set_field(field, value);
    Ok(())
}

/// Reads an encoded answer.
pub fn read_wire(output: &MessageDescriptor, wire: Bytes) -> Result<DynamicMessage, Error> {
    DynamicMessage::decode(output.clone(), wire).map_err(|error| Error::internal(format_args!("own answer: {error}")))
}

/// Writes an answer.
pub fn write(message: &DynamicMessage) -> Result<Vec<u8>, Error> {
    const OPTIONS: SerializeOptions = SerializeOptions::new().skip_default_fields(false);
    let mut json = Vec::with_capacity(512);
    message
        .serialize_with_options(&mut serde_json::Serializer::new(&mut json), &OPTIONS)
        .map_err(|error| Error::internal(format_args!("own answer: {error}")))?;
    Ok(json)
}

/// Writes a message of the public contract as an answer has it; `name` is its type's, such as `Saga`. For tools.
pub fn print<M: prost::Message>(name: &str, message: &M) -> Result<Vec<u8>, Error> {
    let pool = DescriptorPool::decode(proto::DESCRIPTORS).map_err(Error::internal)?;
    let descriptor = pool.get_message_by_name(&format!("{PACKAGE}.{name}"));
    let descriptor = descriptor.ok_or_else(|| Error::internal(format_args!("{name} is no message")))?;
    write(&read_wire(&descriptor, message.encode_to_vec().into())?)
}

fn parse(input: &MessageDescriptor, text: &str) -> Result<DynamicMessage, serde_json::Error> {
    const OPTIONS: DeserializeOptions = DeserializeOptions::new().deny_unknown_fields(true);
    let mut json = serde_json::Deserializer::from_str(text);
    let message = DynamicMessage::deserialize_with_options(input.clone(), &mut json, &OPTIONS)?;
    json.end()?;
    Ok(message)
}

/// The first field at fault, found by reading each alone.
fn fault(message: &MessageDescriptor, value: &serde_json::Value, path: &str) -> Option<Error> {
    let Some(object) = value.as_object() else {
        return Some(Error::invalid(if path.is_empty() { "body" } else { path }, "must be an object"));
    };
    for (key, value) in object {
        let inside = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        let Some(field) = message.get_field_by_json_name(key).or_else(|| message.get_field_by_name(key)) else {
            return Some(Error::invalid(inside(&shortened(key)), "is not a known field"));
        };
        if let Kind::Message(inner) = field.kind()
            && !field.is_list()
            && !field.is_map()
            && !inner.full_name().starts_with("google.protobuf.")
            && !value.is_null()
        {
            if let Some(error) = fault(&inner, value, &inside(field.name())) {
                return Some(error);
            }
        } else if let Err(error) = parse(message, &serde_json::json!({ key: value }).to_string()) {
            return Some(complaint(&inside(field.name()), &error));
        }
    }
    None
}

/// A parser's complaint without its position, which means nothing to who did not see our parsing.
fn complaint(field: &str, error: &serde_json::Error) -> Error {
    let text = error.to_string();
    let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
    Error::invalid(field, shortened(text))
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(LONGEST_COMPLAINT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(name: &str) -> MessageDescriptor {
        let pool = prost_reflect::DescriptorPool::decode(proto::DESCRIPTORS).unwrap();
        pool.get_message_by_name(name).unwrap()
    }

    #[test]
    fn bad_fields_are_named_by_their_path() {
        let input = message("seckill.v1.CreateSaleRequest");
        for (body, field, says) in [
            (r#"{"stock": "many"}"#, "stock", "invalid digit"),
            (r#"{"stock": 1.5}"#, "stock", "expected integer value"),
            (r#"{"stock": 9223372036854775808}"#, "stock", "out of range"),
            (r#"{"stock": true}"#, "stock", "invalid type: boolean"),
            (r#"{"stok": 1}"#, "stok", "is not a known field"),
            (r#"{"price": {"units": [1]}}"#, "price.units", "invalid type: sequence"),
            (r#"{"price": {"unit": 1}}"#, "price.unit", "is not a known field"),
            (r#"{"price": "1"}"#, "price", "must be an object"),
            (r#"{"startTime": "soon"}"#, "start_time", ""),
            (r#"{"payment_window": "5 minutes"}"#, "payment_window", ""),
            (r#"{"title": 7}"#, "title", "invalid type: integer"),
            (r#"[]"#, "body", "must be an object"),
            (r#""x""#, "body", "must be an object"),
            (r#"{"#, "body", "EOF"),
            (r#"{} {}"#, "body", "trailing"),
        ] {
            let error = read_body(&input, body.as_bytes()).unwrap_err();
            assert_eq!(error.field.as_deref(), Some(field), "{body}: {}", error.message);
            assert!(error.message.contains(says), "{body}: {}", error.message);
            assert!(!error.message.contains(" at line "), "{}", error.message);
        }
        assert_eq!(read_body(&input, b"{\"title\": \"\xff\"}").unwrap_err().field.as_deref(), Some("body"));
        let huge = format!(r#"{{"stock": "{}"}}"#, "9".repeat(10_000));
        assert!(read_body(&input, huge.as_bytes()).unwrap_err().message.len() < 300);
    }

    #[test]
    fn names_in_both_spellings_and_numbers_in_both_forms_are_understood() {
        let input = message("seckill.v1.CreateSaleRequest");
        let both =
            [r#"{"perBuyerLimit": "2", "paymentWindow": "5s"}"#, r#"{"per_buyer_limit": 2, "payment_window": "5s"}"#];
        let [one, other] = both.map(|text| read_body(&input, text.as_bytes()).unwrap());
        assert_eq!(one, other);
        assert_eq!(read_body(&input, b"").unwrap(), DynamicMessage::new(input));
    }

    #[test]
    fn answers_have_every_field_but_unset_messages() {
        let order = proto::v1::Order { name: "orders/1".into(), quantity: 1, ..Default::default() };
        let wire = prost::Message::encode_to_vec(&order);
        let answer = write(&read_wire(&message("seckill.v1.Order"), wire.into()).unwrap()).unwrap();
        assert_eq!(
            String::from_utf8(answer).unwrap(),
            r#"{"name":"orders/1","sale":"","buyer":"","quantity":"1","state":"ORDER_STATE_UNSPECIFIED","rejectReason":"","etag":""}"#
        );
    }
}
