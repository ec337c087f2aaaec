// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Calls an API that MojoAuth protects, with an access token from Vault. See
// examples/README.md for the variables.

using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Http;
using System.Runtime.Serialization;
using System.Runtime.Serialization.Json;
using System.Text;
using System.Text.RegularExpressions;
using System.Threading.Tasks;

[DataContract]
class VaultAnswer
{
    [DataMember(Name = "data")] public VaultData Data { get; set; }
    [DataMember(Name = "errors")] public string[] Errors { get; set; }

    // Parse returns null if the body is not from Vault, but from something in front of it.
    public static VaultAnswer Parse(string body)
    {
        try
        {
            using (var stream = new MemoryStream(Encoding.UTF8.GetBytes(body)))
                return (VaultAnswer)new DataContractJsonSerializer(typeof(VaultAnswer)).ReadObject(stream);
        }
        catch (SerializationException)
        {
            return null;
        }
    }
}

[DataContract]
class VaultData
{
    [DataMember(Name = "access_token")] public string AccessToken { get; set; }
    [DataMember(Name = "last_vault_rotation")] public string LastVaultRotation { get; set; }
    [DataMember(Name = "ttl")] public int Ttl { get; set; }
}

class Answer
{
    public int Status;
    public string Body;
}

class Failure : Exception
{
    public Failure(string message) : base(message) { }
}

static class CallApi
{
    // A redirect could send the token to another host.
    static readonly HttpClient Client = new HttpClient(new HttpClientHandler { AllowAutoRedirect = false })
    {
        Timeout = TimeSpan.FromSeconds(30),
    };
    static readonly Stopwatch Clock = Stopwatch.StartNew();
    static string cached;
    static string mintedAt;
    static TimeSpan readAgain;

    static string Setting(string name, string otherwise = null)
    {
        var value = Environment.GetEnvironmentVariable(name);
        if (!string.IsNullOrEmpty(value)) return value;
        if (otherwise == null) throw new Failure(name + " is not set");
        return otherwise;
    }

    // Returns the token if it fits into a header. An error about a malformed one would
    // show it.
    static string Bare(string name, string value)
    {
        if (!Regex.IsMatch(value ?? "", @"\A[!-~]+\z")) throw new Failure(name + " is not a bare token");
        return value;
    }

    static async Task<Answer> Get(string url, string header, string value)
    {
        using (var request = new HttpRequestMessage(HttpMethod.Get, url))
        {
            request.Headers.TryAddWithoutValidation(header, value);
            try
            {
                using (var response = await Client.SendAsync(request))
                {
                    var body = await response.Content.ReadAsStringAsync();
                    return new Answer { Status = (int)response.StatusCode, Body = body.Trim() };
                }
            }
            catch (Exception e) when (e is HttpRequestException || e is OperationCanceledException)
            {
                // The innermost exception has the reason.
                throw new Failure("no response from " + url + ": " + e.GetBaseException().Message);
            }
        }
    }

    // Reads from Vault, and caches the token for the ttl that Vault returns.
    static async Task<string> TokenOfVault(bool refused)
    {
        var now = Clock.Elapsed;
        if (cached != null && !refused && now < readAgain) return cached;

        var url = Setting("VAULT_ADDR").TrimEnd('/') + "/v1/" + Setting("MOUNT", "mojoauth") + "/creds/" + Setting("ROLE", "demo");
        // A token that is newer than the refused one.
        if (refused) url += "?minted_after=" + Uri.EscapeDataString(mintedAt);
        var vaultToken = Bare("VAULT_TOKEN", Setting("VAULT_TOKEN"));
        var answer = await Get(url, "X-Vault-Token", vaultToken);
        if (answer.Status == 429 || answer.Status >= 500)
        {
            // Vault restarts a killed plugin at the next request. After a 429, fewer
            // token requests may be waiting by then.
            await Task.Delay(1000);
            answer = await Get(url, "X-Vault-Token", vaultToken);
        }
        var parsed = VaultAnswer.Parse(answer.Body);
        if (answer.Status != 200)
        {
            var text = parsed?.Errors?.Any() == true ? string.Join("; ", parsed.Errors) : answer.Body;
            throw new Failure("Vault returned " + answer.Status + ": " + Regex.Replace(text, @"\s+", " ").Trim());
        }
        if (parsed?.Data == null) throw new Failure("Vault returned no token");
        cached = Bare("access_token", parsed.Data.AccessToken);
        mintedAt = parsed.Data.LastVaultRotation;
        readAgain = now + TimeSpan.FromSeconds(parsed.Data.Ttl);
        return cached;
    }

    static async Task<Answer> Call(bool refused)
    {
        // Read the file for every call, because Vault Agent replaces it.
        var file = Setting("TOKEN_FILE", "");
        var token = file != "" ? Bare("TOKEN_FILE", File.ReadAllText(file).Trim()) : await TokenOfVault(refused);
        return await Get(Setting("API_URL"), "Authorization", "Bearer " + token);
    }

    static async Task Run()
    {
        var calls = int.Parse(Setting("CALLS", "1"), CultureInfo.InvariantCulture);
        var interval = TimeSpan.FromSeconds(double.Parse(Setting("INTERVAL", "1"), CultureInfo.InvariantCulture));
        for (var call = 0; call < calls; call++)
        {
            if (call > 0) await Task.Delay(interval);
            var answer = await Call(refused: false);
            // The API may accept a newer token. Try only once: a second 401 has
            // another cause.
            if (answer.Status == (int)HttpStatusCode.Unauthorized) answer = await Call(refused: true);
            if (answer.Status < 200 || answer.Status > 299)
                throw new Failure("the API returned " + answer.Status + ": " + answer.Body);
            Console.WriteLine(answer.Status + " " + answer.Body);
        }
    }

    static int Main()
    {
        try
        {
            Run().GetAwaiter().GetResult();
            return 0;
        }
        catch (Exception e)
        {
            Console.Error.WriteLine("call-api: " + e.Message);
            return 1;
        }
    }
}
