// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// This file reads the fields of a request before the framework does, for two reasons.
// The framework's errors repeat a value that it cannot parse, and Vault writes errors to
// its log and, in the clear, to its audit log: a client secret sent twice, and so as a
// list, would end up there. And the framework parses all that was sent, up to 32 MiB,
// before a handler can refuse it.

const (
	// maxUnknownFields bounds the parameters that the path does not know, because a
	// warning lists them all.
	maxUnknownFields = 100
	// longestUnknownField is in bytes.
	longestUnknownField = 128
)

// bound limits the size of a field.
type bound struct {
	bytes   int    // of the string, or of all entries without separators
	entries int    // 0 for a field that is one string
	what    string // plural noun for the entries
}

// bounds has the fields with a bound of their own, by name. A field means the same in
// every path.
var bounds = map[string]bound{
	"token_url":     {bytes: 2 << 10},
	"client_id":     {bytes: 1 << 10},
	"client_secret": {bytes: 4 << 10},
	"ca_cert":       {bytes: 64 << 10},
	"audience":      {bytes: 2 << 10},
	"scopes":        {bytes: 4 << 10, entries: 100, what: "scopes"},
	"extra_params":  {bytes: 4 << 10, entries: 32, what: "entries"},
	"config":        {bytes: longestName},
}

// boundOf returns the bound of a field. Fields without a bound of their own are names,
// numbers, durations, and the like.
func boundOf(field string) bound {
	if own, ok := bounds[field]; ok {
		return own
	}
	return bound{bytes: 256}
}

// exceeded returns an error if a field with that many bytes and entries exceeds its bound.
func (b bound) exceeded(field string, bytes, entries int) error {
	switch {
	case b.entries > 0 && entries > b.entries:
		return fmt.Errorf("%s has more than %d %s; send fewer", field, b.entries, b.what)
	case b.entries > 0 && bytes > b.bytes:
		return fmt.Errorf("%s is longer than %s in total; send fewer or shorter %s", field, inBytes(b.bytes), b.what)
	case bytes > b.bytes:
		return fmt.Errorf("%s is longer than %s; send a shorter value", field, inBytes(b.bytes))
	}
	return nil
}

func inBytes(n int) string {
	if n%1024 == 0 {
		return fmt.Sprintf("%d KiB (%d bytes)", n/1024, n)
	}
	return fmt.Sprintf("%d bytes", n)
}

// checkText checks the size of a field that is one string.
func checkText(field, text string) error {
	return boundOf(field).exceeded(field, len(text), 0)
}

// HandleExistenceCheck reports to Vault whether a write is a create or an update. That
// depends on the path alone. It leaves the fields to HandleRequest, because Vault calls it
// before it checks policies, and logs its errors.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (checkFound, exists bool, err error) {
	if problem, checked := checkName(req); problem != "" {
		return checked, false, nil // HandleRequest refuses it
	}
	bare := *req
	bare.Data = nil
	return b.Backend.HandleExistenceCheck(ctx, &bare)
}

// HandleRequest handles a request.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	if !mayUseSnapshot(req) {
		return nil, logical.ErrUnsupportedOperation
	}
	problem, _ := checkName(req)
	if problem == "" {
		req, problem = b.readFields(req)
	}
	if problem != "" {
		return logical.ErrorResponse(problem), nil
	}
	resp, err := b.Backend.HandleRequest(ctx, req)
	return withoutForwarding(resp, err)
}

// readFields returns the request without the fields that are null, which count as omitted.
// problem says what is wrong with one of the other fields.
func (b *backend) readFields(req *logical.Request) (_ *logical.Request, problem string) {
	if len(req.Data) == 0 || req.Operation == logical.RevokeOperation || req.Operation == logical.RenewOperation {
		return req, ""
	}
	path := b.Route(req.Path)
	if path == nil {
		return req, ""
	}
	data := &framework.FieldData{Raw: make(map[string]any, len(path.Fields)), Schema: path.Fields}
	known := 0
	for _, name := range slices.Sorted(maps.Keys(path.Fields)) {
		value, sent := req.Data[name]
		if sent {
			known++
		}
		if value == nil {
			if sent && name == "client_secret" {
				// A policy's required_parameters would let null pass.
				return nil, "client_secret is null; send the secret, or omit the field to keep the stored secret"
			}
			continue
		}
		if err := checkSize(name, value); err != nil {
			return nil, err.Error()
		}
		data.Raw[name] = value
		if _, _, err := data.GetOkErr(name); err != nil {
			return nil, invalidType(name, path.Fields[name].Type)
		}
	}
	if unknown := len(req.Data) - known; unknown > maxUnknownFields {
		return nil, fmt.Sprintf("the request has %d parameters that %s does not have; send at most %d", unknown, req.Path, maxUnknownFields)
	}
	for name, value := range req.Data {
		if path.Fields[name] != nil {
			continue
		}
		if len(name) > longestUnknownField {
			return nil, fmt.Sprintf("the request has a parameter that %s does not have, with a name longer than %d bytes; remove it", req.Path, longestUnknownField)
		}
		data.Raw[name] = value
	}
	sent := *req
	sent.Data = data.Raw
	return &sent, ""
}

// checkSize checks the size of a value as sent, in a time that depends on the bound and not
// on the value. It allows twice the field's bound, because separators, duplicates, and
// white space do not count once they are removed.
func checkSize(field string, value any) error {
	limit := boundOf(field)
	// A string sent as a short list is refused later, for its type.
	left := room{bytes: 2 * limit.bytes, entries: 2 * max(limit.entries, 32)}
	left.take(value)
	switch {
	case left.entries < 0 && limit.entries > 0:
		return limit.exceeded(field, 0, limit.entries+1)
	case left.entries < 0 || left.bytes < 0:
		return limit.exceeded(field, limit.bytes+1, 0)
	}
	return nil
}

// room is the size that is still allowed. It is exhausted when one of its values is
// negative.
type room struct{ bytes, entries int }

// take subtracts the size of a value decoded from JSON, and stops when room is exhausted.
func (r *room) take(value any) {
	switch value := value.(type) {
	case string:
		r.bytes -= len(value)
	case json.Number:
		r.bytes -= len(value)
	case []any:
		r.entries -= len(value)
		for i := 0; i < len(value) && r.bytes >= 0 && r.entries >= 0; i++ {
			r.take(value[i])
		}
	case []string:
		r.entries -= len(value)
		for i := 0; i < len(value) && r.bytes >= 0 && r.entries >= 0; i++ {
			r.take(value[i])
		}
	case map[string]any:
		r.entries -= len(value)
		for name, entry := range value {
			if r.bytes < 0 || r.entries < 0 {
				return
			}
			r.bytes -= len(name)
			r.take(entry)
		}
	default: // a number, true or false
		r.bytes--
	}
}

// invalidType returns the error for a field whose value does not have that type.
func invalidType(field string, t framework.FieldType) string {
	switch t {
	case framework.TypeBool:
		return field + " is not valid; send true or false"
	case framework.TypeInt:
		return field + " is not valid; send a whole number"
	case framework.TypeDurationSecond:
		return field + " is not valid; send a non-negative number of seconds, or a duration such as 10m"
	case framework.TypeCommaStringSlice:
		return field + " is not valid; send a list of strings or one comma-separated string"
	case framework.TypeKVPairs:
		return field + " is not valid; send an object with string values, or name=value pairs"
	default:
		return field + " is not valid; send it once, as one string"
	}
}
