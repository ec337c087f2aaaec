module github.com/mojoauth/vault-plugin-secrets-mojoauth/examples/go

go 1.22
