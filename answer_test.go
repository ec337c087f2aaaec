// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/redact"
)

// read parses an answer for a client whose secret is the canary.
func read(status int, body any) (*token, *mintError) {
	text, ok := body.(string)
	if !ok {
		encoded, err := json.Marshal(body)
		if err != nil {
			panic(err)
		}
		text = string(encoded)
	}
	now := time.Now()
	return readAnswer(&answer{status: status, body: []byte(text), sentAt: now, receivedAt: now}, redact.New(canary, forwardingTexts...))
}

type object = map[string]any

// A known OAuth error decides the class; otherwise the status does.
func TestFailuresConcernTheRequestTheClientOrTheServer(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
		class  errorClass
	}{
		{400, "", classRequestRefused},
		{413, "", classRequestRefused},
		{414, "", classRequestRefused},
		{415, "", classRequestRefused},
		{422, "", classRequestRefused},
		{431, "", classRequestRefused},
		{400, "odd_error", classRequestRefused},
		{200, "odd_error", classRequestRefused},
		{413, "invalid_client", classClientRefused},
		{400, "unauthorized_client", classClientRefused},
		{200, "invalid_client", classClientRefused},
		{500, "invalid_client", classClientRefused},
		{401, "", classClientRefused},
		{403, "", classClientRefused},
		{403, "odd_error", classClientRefused},
		{404, "", classClientRefused},
		{405, "", classClientRefused},
		{418, "", classClientRefused},
		{403, "access_denied", classRequestRefused},
		{401, "invalid_scope", classRequestRefused},
		{500, "invalid_target", classRequestRefused},
		{429, "", classThrottled},
		{429, "odd_error", classThrottled},
		{429, "invalid_client", classClientRefused},
		{500, "", classServerError},
		{599, "odd_error", classServerError},
		{400, "temporarily_unavailable", classServerError},
		{101, "", classUnexpected},
		{102, "", classUnexpected},
		{101, "invalid_client", classClientRefused},
		{302, "", classUnexpected},
		{307, "odd_error", classUnexpected},
		{999, "", classServerError},
	} {
		_, failed := read(c.status, object{"error": c.code, "access_token": "tok"})
		if failed == nil || failed.class != c.class || failed.status != c.status || failed.oauthError != c.code {
			t.Errorf("%d %q: got %v, want class %s", c.status, c.code, failed, c.class)
		}
	}
}

// The token type and the scope are shown to readers and operators on one line. They
// contain no line breaks or quotes, and their length is bounded.
func TestTypeAndScopeHaveOnlyRFC6749Characters(t *testing.T) {
	long := strings.Repeat("s", 100)
	many := strings.Repeat(long+" ", 100)
	for _, c := range []struct {
		tokenType, scope any
		wantType, want   string
	}{
		{"bearer", "a b", "Bearer", "a b"},
		{"urn:ietf:params:oauth:token-type:jwt", "https://a.test/read", "urn:ietf:params:oauth:token-type:jwt", "https://a.test/read"},
		{"DPoP\r\nX-Evil: 1", "a\r\nX-Evil: 1", "Bearer", "a X-Evil: 1"},
		{"Be arer", "a\x00b c", "Bearer", "c"},
		{"Bearer\x1b[31m", `a"b c\d e`, "Bearer", "e"},
		{"<script>", []string{"a\nb", "c\td", "\u202ee", "f"}, "Bearer", "a b c d f"},
		{"тип", "äöü", "Bearer", ""},
		{long, many, "Bearer", strings.TrimSpace(many[:81*101])},
		{long[:64], long, long[:64], long},
		{5, 5, "Bearer", ""},
	} {
		tok, failed := read(200, object{"access_token": "tok", "token_type": c.tokenType, "scope": c.scope})
		if failed != nil {
			t.Errorf("%q: %v", c.tokenType, failed)
			continue
		}
		if tok.tokenType != c.wantType {
			t.Errorf("type %q: got %q, want %q", c.tokenType, tok.tokenType, c.wantType)
		}
		if tok.scope != c.want {
			t.Errorf("scope %q: got %q, want %q", c.scope, tok.scope, c.want)
		}
	}
}

func TestAccessTokenIsVisibleASCII(t *testing.T) {
	for _, odd := range []string{"a b", " a", "a\n", "a\x7f", "tök", "a\u202eb", "a\x00"} {
		if _, failed := read(200, object{"access_token": odd}); failed == nil || failed.class != classUnexpected {
			t.Errorf("%q: got %v, want an error", odd, failed)
		}
	}
	if tok, failed := read(200, object{"access_token": "!~eyJ.a-b_c/+="}); failed != nil || tok.accessToken != "!~eyJ.a-b_c/+=" {
		t.Errorf("visible ASCII: got %v, %v", tok, failed)
	}
}

// The credentials and the endpoint are good; only this token is unusable.
func TestExpiredJWTIsExpiredOnArrival(t *testing.T) {
	_, failed := read(200, object{"access_token": jwt(`{"exp":1000}`), "expires_in": 3600})
	if failed == nil || failed.class != "expired_on_arrival" {
		t.Fatalf("got %v, want class expired_on_arrival", failed)
	}
	if failed.refused() || failed.retryable() || failed.acceptsClient() || !failed.concernsRequest() {
		t.Errorf("refused %v, retryable %v, acceptsClient %v, concernsRequest %v; want only the last", failed.refused(), failed.retryable(), failed.acceptsClient(), failed.concernsRequest())
	}
	if text := failed.Error() + ". " + failed.remedy(); strings.Contains(text, "no token") || !strings.Contains(text, "exp claim had already passed") || !strings.Contains(text, "max_ttl") {
		t.Errorf("got %q, want it to say what expired and what to check", text)
	}
}

func TestLifetimeIsAtMostAYear(t *testing.T) {
	for _, answer := range []object{
		{"access_token": "tok", "expires_in": 1e12},
		{"access_token": "tok", "expires_in": "9999-12-31T23:59:59Z"},
		{"access_token": jwt(`{"exp":200000000000}`)},
		{"access_token": jwt(`{"exp":200000000000}`), "expires_in": 1e300},
	} {
		if tok, failed := read(200, answer); failed != nil || tok.reported != lifetime.Longest {
			t.Errorf("%v: got %v, %v", answer, tok, failed)
		}
	}
}

// MojoAuth may repeat what it received, but must not reveal too much of the secret.
func TestDescriptionThatEchoesTheSecretIsWithheld(t *testing.T) {
	const kept = "the audience https://api.example.com is unknown to client-1"
	quoted, _ := json.Marshal(canary + `"`)
	for name, answer := range map[string]object{
		"verbatim":          {"error_description": "no " + canary},
		"upper case":        {"error_description": "no " + strings.ToUpper(canary)},
		"one byte short":    {"error_description": "no " + canary[1:]},
		"half of it":        {"error_description": "no " + canary[3:3+(len(canary)+1)/2]},
		"double percent":    {"error_description": "no " + strings.ReplaceAll(canary, "-", "%252D")},
		"JavaScript":        {"error_description": "no " + strings.ReplaceAll(canary, "-", `\x2D`)},
		"HTML number":       {"error_description": "no " + strings.ReplaceAll(canary, "-", "&#45;")},
		"JSON in JSON":      {"error_description": `{"secret":` + string(quoted) + "}"},
		"base64":            {"error_description": "no " + base64.StdEncoding.EncodeToString([]byte(canary))},
		"raw credentials":   {"error_description": "no Basic " + base64.StdEncoding.EncodeToString([]byte("cli ent:"+canary))},
		"form-encoded":      {"error_description": "no " + base64.StdEncoding.EncodeToString([]byte(url.Values{"client_secret": {canary}}.Encode()))},
		"over two fields":   {"message": "no " + canary[:12], "description": canary[12:]},
		"over three fields": {"error": canary[:8], "message": canary[8:16], "description": canary[16:]},
		"beyond the cut":    {"error_description": strings.Repeat("x", 250) + canary},
	} {
		_, failed := read(400, answer)
		if failed == nil || failed.description != withheld {
			t.Errorf("%s: got %v, want the description withheld", name, failed)
		}
		if failed != nil && holdsHalfOf(failed.Error(), canary) {
			t.Errorf("%s: the error contains half of the secret: %v", name, failed)
		}
	}
	if _, failed := read(400, object{"error": canary, "error_description": "no"}); failed == nil || strings.Contains(failed.Error(), canary) {
		t.Errorf("the secret as an error code: got %v, want it withheld", failed)
	}
	// A shorter piece does not let a caller who chooses the text confirm a guess of the
	// secret.
	for _, shown := range []string{kept, kept + " " + canary[:len(canary)/2-1], kept + canary[4:12]} {
		if _, failed := read(400, object{"error": "invalid_target", "error_description": shown}); failed == nil || failed.description != shown {
			t.Errorf("%q: got %v, want the description", shown, failed)
		}
	}
}

func TestDescriptionsAreCutToOneLine(t *testing.T) {
	_, failed := read(400, object{"error_description": "line\r\nend\x1b[31m"})
	if failed.description != "lineend[31m" {
		t.Errorf("got %q", failed.description)
	}
	_, failed = read(400, object{"error_description": strings.Repeat("ä", 300)})
	if got := []rune(failed.description); len(got) != 256 {
		t.Errorf("long description: got %d characters, want 256", len(got))
	}
}

// Vault and OpenBao match these texts anywhere in an error. MojoAuth must not be able to
// redirect a read.
func TestDescriptionThatWouldForwardIsWithheld(t *testing.T) {
	for _, text := range []string{
		"cannot write to readonly storage",
		"rpc error: node is not the leader!",
		"Please Forward To The Active Node",
		"Vault is in standby mode",
	} {
		if !forwardsElsewhere("config \"x\": " + text) {
			t.Errorf("%q is not recognized", text)
		}
		for _, answer := range []object{
			{"error_description": "well: " + text},
			{"error": text},
			{"error": "invalid_scope", "error_description": strings.ReplaceAll(text, " ", "\u200b \x00")},
			{"message": text[:9], "description": text[9:]},
			{"error_description": url.QueryEscape(text)},
		} {
			_, failed := read(400, answer)
			if failed == nil || forwardsElsewhere(failed.Error()) || !strings.Contains(failed.Error(), withheld) {
				t.Errorf("%v: got %v, want the description withheld", answer, failed)
			}
		}
	}
	if forwardsElsewhere("the node is the leader; storage is readonly") {
		t.Error("an innocent text matches")
	}
}

// Readers of another role must not learn what this role requests.
func TestWithoutDescription(t *testing.T) {
	_, failed := read(403, object{"error": "unauthorized_client", "error_description": "not for https://reports.internal"})
	bare := failed.withoutDescription()
	if text := bare.Error(); text != "MojoAuth refused the client: unauthorized_client (HTTP 403)" {
		t.Errorf("got %q", text)
	}
	if bare.class != failed.class || bare.status != 403 || bare.remedy() != failed.remedy() || !strings.Contains(failed.Error(), "reports.internal") {
		t.Errorf("got %v from %v", bare, failed)
	}
	_, failed = read(403, object{"error": "not for https://reports.internal"})
	if text := failed.withoutDescription().Error(); text != "MojoAuth refused the client (HTTP 403)" {
		t.Errorf("a custom error code: got %q", text)
	}
}

func TestRetryAfterForms(t *testing.T) {
	now := time.Date(2027, 1, 2, 3, 4, 5, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"20":                            20 * time.Second,
		" 20 ":                          20 * time.Second,
		"-5":                            0,
		"soon":                          0,
		"1.5":                           0,
		"3600":                          10 * time.Minute,
		"99999999999999999999":          10 * time.Minute,
		"9223372036854775807":           10 * time.Minute,
		"Sat, 02 Jan 2027 03:04:35 GMT": 30 * time.Second,
		"Sat, 02 Jan 2027 03:00:00 GMT": 0,
		"Sun, 02 Jan 2033 03:00:00 GMT": 10 * time.Minute,
	} {
		if got := retryAfter(http.Header{"Retry-After": {value}}, now); got != want {
			t.Errorf("%q: got %s, want %s", value, got, want)
		}
	}
}
